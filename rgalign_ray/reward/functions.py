"""What a latent query is worth: plain functions from scores and clicks to one number per query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from rgalign_ray import config, metrics
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import uniform
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.reasoner.engine import Sample

RESOLVED = "resolved"
LOOP_REPEATS = 3
"""Times that the same three tokens in a row may not occur in a query."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a session's reward asks for: bool [S, C] each."""

    clicks: np.ndarray
    resolved: np.ndarray | None
    """Clicks that resolved the need; None where the settings do not ask for them."""

    @classmethod
    def of(
        cls,
        settings: config.Reward,
        sessions: pa.Table,
        arrays: Mapping[str, np.ndarray],
        catalogue: Catalogue,
        reader: Literal["reward", "auditor"] = "reward",
    ) -> Labels:
        """The labels of a table of sessions, whose arrays are as `logs.examples.examples` makes them.

        Raises:
            DataError: when the reward asks for `resolved`, and the log does not know it.
        """
        clicks, resolved = arrays["clicks"], None
        if settings.halves:
            mine, other = halves(clicks, arrays["candidates"], arrays["session_key"])
            clicks = mine if reader == "reward" else other
        if settings.resolved_weight:
            if RESOLVED not in sessions.column_names:
                raise DataError("reward.resolved_weight: the log has no column 'resolved'; set it to 0.")
            resolved = clicks & catalogue.padded(sessions[RESOLVED], arrays["candidates"])
        return cls(clicks, resolved)

    def take(self, rows: np.ndarray, width: int | None = None) -> Labels:
        """Those of some sessions, of the first `width` candidates."""
        return Labels(self.clicks[rows, :width], None if self.resolved is None else self.resolved[rows, :width])


def asked_of(settings: config.Reward, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [S, C]: the candidates from which a click is told.

    A ranker that ranks by which intent is clicked if shown knows nothing of which is shown: held against all candidates
    it would ask queries to say that instead.
    """
    exists: np.ndarray = arrays["candidates"] >= 0
    return exists & arrays["shown"] if settings.rank_by == "click" else exists


def halves(clicks: np.ndarray, candidates: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A session's clicks dealt to two hands in an order drawn by hash; the first has one more of an odd number.

    Args:
        clicks: bool [S, C].
        candidates: int [S, C], intents by index.
        keys: int64 [S], of the sessions.
    """
    salted = keys[:, None] ^ (candidates.astype(np.int64) << np.int64(20))
    drawn = np.where(clicks, uniform(salted.ravel(), 0, "halves").reshape(clicks.shape), np.inf)
    place = drawn.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return clicks & (place % 2 == 0), clicks & (place % 2 == 1)


def reward(settings: config.Reward, scores: np.ndarray, labels: Labels, mask: np.ndarray) -> np.ndarray:
    """The reward of the settings, (1 − w)·r(clicks) + w·r(resolved); shapes as in `logprob`.

    Where no click resolved the need the second part is 0: rewards are compared within a session alone, and
    there it is the same for all. With w = 1 such a session has none, nan.
    """

    def of(relevant: np.ndarray) -> np.ndarray:
        match settings.kind:
            case "logprob":
                return logprob(scores, relevant, mask)
            case "ndcg":
                return ndcg(scores, relevant, mask, settings.k)

    weight = settings.resolved_weight
    if labels.resolved is None or weight == 0:
        return of(labels.clicks)
    resolved = of(labels.resolved)
    if weight == 1:
        return resolved
    return (1 - weight) * of(labels.clicks) + weight * np.nan_to_num(resolved)


def logprob(scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean log-probability of the clicked intents under the softmax over candidates.

    Args:
        scores: float [S, N, C], of N queries in S sessions over C candidates.
        clicks: bool [S, C].
        mask: bool [S, C], as `asked_of` has it; False on padding.

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
