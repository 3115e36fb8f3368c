"""The linear probe of embeddings."""

from __future__ import annotations

import numpy as np

from benchmarks.embedding_probe import Labelled, probe, zero_shot
from rgalign_ray.hashing import session_keys
from rgalign_ray.ranker.embeddings import Embeddings

INTENTS = np.array([f"i{i:02d}" for i in range(12)])


def test_the_probe_finds_what_is_there_and_what_its_labels_teach() -> None:
    draw = np.random.default_rng(0)
    need = INTENTS[draw.integers(12, size=900)]
    chance = INTENTS[draw.integers(12, size=900)]
    clicked = np.where(draw.random(900) < 0.3, need, "")
    role = np.array(["rank"] * 500 + ["valid"] * 150 + ["test"] * 250)
    sessions = Labelled(
        [f"s{i}" for i in range(900)], [f"u{i}" for i in range(900)], role, need, clicked, INTENTS.tolist()
    )
    vectors = draw.normal(size=(12, 16))[np.searchsorted(INTENTS, need)] + 0.5 * draw.normal(size=(900, 16))
    told, taught = probe(sessions, vectors, need)
    assert told.shape == (250,) and taught == 500
    assert told.mean() > 0.95
    some, fewer = probe(sessions, vectors, clicked)
    assert fewer == int((clicked[:500] != "").sum()) and 0.8 < some.mean() <= told.mean()
    blind, _ = probe(sessions, vectors, chance)
    assert abs(blind.mean() - 0.25) < 0.1, "three of twelve by chance"
    nothing, _ = probe(sessions, draw.normal(size=vectors.shape), need)
    assert abs(nothing.mean() - 0.25) < 0.1


def test_a_cosine_finds_what_the_means_hide() -> None:
    draw = np.random.default_rng(1)
    need = INTENTS[draw.integers(12, size=600)]
    role = np.array(["rank"] * 300 + ["test"] * 300)
    ids = [f"s{i}" for i in range(600)]
    sessions = Labelled(ids, ids, role, need, np.full(600, ""), INTENTS.tolist())
    meaning, shared = draw.normal(size=(12, 16)), 20 * draw.normal(size=(2, 16))
    vectors = meaning[np.searchsorted(INTENTS, need)] + 0.5 * draw.normal(size=(600, 16)) + shared[0]
    keys = np.sort(session_keys(INTENTS.tolist()))
    order = np.argsort(session_keys(INTENTS.tolist()))
    texts = Embeddings("e", 16, {"item": (keys, (meaning + shared[1])[order].astype(np.float16))})
    found = np.ones(600, bool)
    assert zero_shot(sessions, vectors, found, texts, centred=True).mean() > 0.95
    assert zero_shot(sessions, vectors, found, texts).mean() < 0.6
