"""A small synthetic log for the ranker's tests: half of the need lies in one field, half in the embedding."""

from __future__ import annotations

import numpy as np

from rgalign_ray.hashing import session_keys
from rgalign_ray.ranker.sizes import Sizes


def sizes(intents: int = 24, dim: int = 24, fields: int = 4, item_dim: int = 0, match_dim: int = 0) -> Sizes:
    return Sizes(
        field_size=fields * 8,
        num_fields=fields,
        multi_size=10,
        num_multi=1,
        multi_length=3,
        history_size=12,
        history_length=5,
        num_intents=intents,
        embedding_dim=dim,
        item_dim=item_dim,
        match_dim=match_dim,
    )


def rows(s: Sizes, n: int = 300, seed: int = 0, in_embedding: float = 1.0, in_fields: float = 0.0) -> dict:
    """Sessions whose click is their need; the need is told by the embedding and by field 0 with these shares.

    Every fifth session has no click, every third has e(x,q), every sixth validates.
    """
    draw = np.random.default_rng(seed)
    world = np.random.default_rng(12345)  # the same directions whatever the sample
    need = draw.integers(8, size=n)
    meaning = world.normal(size=(8, max(s.embedding_dim, 1)))
    clicked_intent = np.array([i % s.num_intents for i in range(0, 24, 3)])[need]
    told = draw.random(n) < in_embedding
    prompt = np.where(told[:, None], meaning[need], 0) + 0.3 * draw.normal(size=(n, max(s.embedding_dim, 1)))
    fields = draw.integers(8, size=(n, s.num_fields))
    fields[:, 0] = np.where(draw.random(n) < in_fields, need, fields[:, 0])
    candidates = np.stack([draw.permutation(s.num_intents) for _ in range(n)])
    clicks = (candidates == clicked_intent[:, None]) & (np.arange(n) % 5 > 0)[:, None]
    has_query = np.arange(n) % 3 == 0
    embedding = (prompt * 3 + 1).astype(np.float16)[:, : s.embedding_dim]
    return {
        "fields": (fields + 8 * np.arange(s.num_fields)).astype(np.int32),
        "multi": draw.integers(10, size=(n, s.num_multi, s.multi_length)).astype(np.int32),
        "history": draw.integers(12, size=(n, s.history_length)).astype(np.int32),
        "candidates": candidates.astype(np.int32),
        "shown": clicks | (draw.random(candidates.shape) < 0.2),
        "clicks": clicks,
        "session_key": session_keys([f"{seed}-{i}" for i in range(n)]),
        "valid": np.arange(n) % 6 == 0,
        "prompt": embedding,
        "query": np.where(has_query[:, None], embedding, np.float16(0)),
        "has_prompt": np.full(n, s.embedding_dim > 0),
        "has_query": has_query & (s.embedding_dim > 0),
    }


def shuffle_embeddings(data: dict, seed: int = 0) -> dict:
    order = np.random.default_rng(seed).permutation(len(data["prompt"]))
    return {**data, **{name: data[name][order] for name in ("prompt", "query", "has_prompt", "has_query")}}
