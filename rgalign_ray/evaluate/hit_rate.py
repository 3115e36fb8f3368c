"""Intent Hit Rate: the share of latent queries that mean what the user needed, by an encoder that is not judged.

A query means the intent whose text is nearest to it by the cosine of a fixed sentence encoder's vectors. The rate
needs true needs, hence the simulated shop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.compute as pc

from rgalign_ray import config, storage
from rgalign_ray.hashing import session_keys

BATCH = 64


def hit_rate_sessions(log_uri: str, truth_uri: str | None, settings: config.Evaluate) -> list[str]:
    """Ids of the test sessions that get a query for it, drawn by hash; none where no truth is known.

    Args:
        truth_uri: the simulated shop's log, whose truth is known; None for other logs.
        settings: `hit_rate_sessions` of them are drawn.
    """
    if truth_uri is None or not settings.hit_rate_sessions:
        return []
    table = storage.read_table(storage.join(log_uri, "sessions"), ["session_id"], filters=pc.field("role") == "test")
    ids = table["session_id"].to_pylist()
    keys = session_keys(ids)
    return [ids[row] for row in np.argsort(keys, kind="stable")[: settings.hit_rate_sessions]]


def hits(
    queries: Sequence[str | None],
    needs: Sequence[int],
    intents: np.ndarray,
    embed: Callable[[list[str]], np.ndarray],
) -> np.ndarray:
    """Whether each query's nearest intent is the need: float64 [S], 1 or 0, nan for a session without a valid query.

    Args:
        queries: [S].
        needs: [S], indices into `intents`.
        intents: float64 [I, D], `vectors` of the intents' texts.
        embed: texts to their vectors [n, D].
    """
    there = [row for row, query in enumerate(queries) if query is not None]
    found = np.full(len(queries), np.nan)
    if not there:
        return found
    close = vectors([str(queries[row]) for row in there], embed) @ intents.T
    found[there] = close.argmax(axis=1) == np.asarray(needs)[there]
    return found


def vectors(texts: list[str], embed: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """float64 [n, D] of unit length."""
    parts = [embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    found = np.concatenate(parts).astype(np.float64)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
