"""What choosing among N latent queries is truly worth: the quality of the ranking that each query leads to.

The reward reads the session's own click and the ranker's own scores. The world knows what the user needed and how
likely a click is, noise-free: if the choice of the reward does not rise with N in its eyes, more samples only find
more of the ranker's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from rgalign_ray import config
from rgalign_ray.evaluate.ladder import top
from rgalign_ray.evaluate.report import Estimate, QueryWorth
from rgalign_ray.evaluate.statistics import stratified_bootstrap
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker.batches import to_batch
from rgalign_ray.ranker.scoring import LoadedRanker
from rgalign_ray.reward.gate import best_of
from rgalign_ray.reward.judging import query_scores
from rgalign_ray.world.oracle import Oracle

REWARD, TRUTH = "reward", "truth"
"""Who chooses: the reward, or the truth itself, which is the most that any choice can reach."""
HELD_OUT = "held_out"
"""The reward's choice for a ranker that had no say in it, as none that is trained later had."""
CURVES = (REWARD, HELD_OUT, TRUTH)
NULL = "null"


@dataclass(frozen=True)
class TrueValues:
    """True expected CTR@k of what is ranked first, by query."""

    queries: np.ndarray
    """float64 [S, N]."""
    null: np.ndarray
    """float64 [S], of the null query."""


def true_values(
    ranker: LoadedRanker, sessions: pa.Table, embeddings: np.ndarray, catalogue: Catalogue, oracle: Oracle, k: int
) -> TrueValues:
    """What the ranker's first k are truly worth, by latent query.

    Args:
        sessions: S rows of the `sessions` table.
        embeddings: float [S, N, H], e(x,q) of each session's queries.
    """
    arrays = examples(sessions, ranker.space, catalogue)
    scores = query_scores(ranker.model, to_batch(arrays), torch.from_numpy(embeddings.astype(np.float32)))
    ids = sessions["session_id"].to_pylist()
    values = [oracle.expected(ids, top(scores[:, n], arrays["candidates"], k))[0] for n in range(scores.shape[1])]
    return TrueValues(np.stack(values[:-1], axis=1), values[-1])


def chosen(reward: np.ndarray, values: TrueValues, held_out: TrueValues) -> dict[str, np.ndarray]:
    """True value of the choice among the first n valid queries, above the mean of the session's queries.

    Args:
        reward: float [S, N], nan where a query is not valid; every session has a valid one.
        values: of a ranker that gives the reward.
        held_out: of one that does not.

    Returns:
        `CURVES` float64 [S, N] for n = 1 … N, and `NULL` [S]: that of no query.
    """
    above, other = (
        np.where(np.isfinite(reward), each.queries, np.nan) - _mean(reward, each)[:, None]
        for each in (values, held_out)
    )
    return {
        REWARD: best_of(reward, above),
        HELD_OUT: best_of(reward, other),
        TRUTH: best_of(above, above),
        NULL: values.null - _mean(reward, values),
    }


def _mean(reward: np.ndarray, values: TrueValues) -> np.ndarray:
    return np.nanmean(np.where(np.isfinite(reward), values.queries, np.nan), axis=1)


def summarise(
    k: int, seeds: Sequence[tuple[Sequence[str], dict[str, np.ndarray]]], settings: config.Evaluate
) -> QueryWorth:
    """The figures of what `chosen` found, with the users of its sessions, a pair a seed."""

    def mean(name: str, n: int | None = None) -> Estimate:
        found = stratified_bootstrap(
            [values[name] if n is None else values[name][:, n] for _, values in seeds],
            [users for users, _ in seeds],
            weights=[None] * len(seeds),
            repetitions=settings.bootstrap,
            confidence=settings.confidence,
        )
        return Estimate(value=found.mean, low=found.users[0], high=found.users[1])

    numbers = range(seeds[0][1][REWARD].shape[1])
    by_reward, held_out, by_truth = ([mean(name, n) for n in numbers] for name in CURVES)
    return QueryWorth(
        metric=f"true CTR@{k}",
        sessions=sum(len(users) for users, _ in seeds),
        by_reward=by_reward,
        held_out=held_out,
        by_truth=by_truth,
        null=mean(NULL),
    )


def sentence(found: QueryWorth) -> str:
    """What the choice among all N is worth, in a sentence."""
    n = len(found.by_reward)

    def told(it: Estimate) -> str:
        return f"{it.value:+.4f} ({it.low:+.4f} to {it.high:+.4f})"

    return (
        f"In truth, over the mean of a session's queries ({found.sessions} sessions): {found.metric} "
        f"{told(found.by_reward[-1])} for the reward's best of {n}, {told(found.held_out[-1])} in the eyes of a ranker "
        f"that had no say in the choice, {told(found.by_truth[-1])} for the best of {n} by "
        f"the truth itself, {told(found.null)} without a query."
    )
