"""What a latent query is worth: plain functions from scores and clicks to one number per query."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rgalign_ray import config, metrics
from rgalign_ray.reasoner.engine import Sample

LOOP_REPEATS = 3
"""Times that the same three tokens in a row may not occur in a query."""


def reward(settings: config.Reward, scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The reward of the settings; shapes as in `logprob`."""
    if settings.kind == "logprob":
        return logprob(scores, clicks, mask)
    return ndcg(scores, clicks, mask, settings.k)


def logprob(scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean log-probability of the clicked intents under the softmax over candidates.

    Args:
        scores: float [S, N, C], of N queries in S sessions over C candidates.
        clicks: bool [S, C].
        mask: bool [S, C], False on padding.

    Returns:
        float64 [S, N]; nan for sessions without a click.
    """
    masked = np.where(mask[:, None], scores.astype(np.float64), -np.inf)
    top = masked.max(axis=-1, keepdims=True)
    log_probabilities = masked - top - np.log(np.exp(masked - top).sum(axis=-1, keepdims=True))
    clicked = (clicks & mask)[:, None]
    with np.errstate(invalid="ignore"):  # 0 / 0 where there is no click
        return np.where(clicked, log_probabilities, 0.0).sum(axis=-1) / clicked.sum(axis=-1)


def ndcg(scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of the clicks; shapes as in `logprob`."""
    sessions, queries, width = scores.shape
    relevant, exists = (np.repeat(labels, queries, axis=0) for labels in (clicks & mask, mask))
    return metrics.ndcg_at_k(scores.reshape(-1, width), relevant, exists, k).reshape(sessions, queries)


def fault(sample: Sample) -> str | None:
    """Why a rollout must not be judged (empty, over_length, non_finite, loop), or None for a valid one."""
    if not sample.query:
        return "empty"
    if sample.finish == "length":
        return "over_length"
    if not np.isfinite(sample.embedding.astype(np.float32)).all():
        return "non_finite"
    ids = sample.completion_ids
    grams = Counter(zip(ids, ids[1:], ids[2:], strict=False))
    return "loop" if max(grams.values(), default=0) >= LOOP_REPEATS else None
