"""The gate before anything is built on the reward: does it tell a session's queries apart, above its noise?

A query's reward is a function of session and query alone, so its noise is the judge's: another ranker
of the same data under another seed. What the judges agree on within a session is what a best of N can
select for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgalign_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Gate:
    """Figures of the reward over sessions with at least two valid queries."""

    sessions: int
    spread: float
    """Mean over sessions of the standard deviation of the reward within the session."""
    noise: float
    """The same of one judge's own noise, sd(r_1 - r_2) / sqrt(2), if both err alike; a mean of judges has less."""
    reliability: float
    """Correlation of two judges' rewards within sessions; 0 says that the reward is noise."""
    agreement: float
    """What the second judge sees in the first one's choice: mean of r_2(best by r_1) - mean r_2."""
    agreement_error: float
    """Standard error of `agreement` over users, whose sessions are alike."""
    best_of_n: list[float]
    """Mean reward, above the session's mean, of the best of the first n queries, n = 1 … N."""
    best_of_n_judged: list[float]
    """The same choices in the eyes of the second judge."""
    spread_by_session: list[float]
    noise_by_session: list[float]
    audit: float | None = None
    """Correlation within sessions of the reward with the auditor's; None without an auditor that can judge any."""
    best_of_n_audited: list[float] | None = None
    """The choices of `best_of_n` in the auditor's eyes."""


def gate(judged: np.ndarray, users: Sequence[str], audited: np.ndarray | None = None) -> Gate:
    """The gate's figures.

    Args:
        judged: float [S, N, 2], the reward and what another judge says; nan where a query is not valid.
        users: [S], whose sessions they are.
        audited: float [S, N], the auditor's rewards of the same queries, if there is one; a session that it has no
            click to judge by is nan throughout.

    Raises:
        DataError: when no session has two valid queries.
    """
    usable = np.isfinite(judged[..., 0]).sum(axis=1) >= 2
    if not usable.any():
        raise DataError("rewards: no session has two valid queries; raise rollout.n or rollout.max_new_tokens.")
    first, second = (_centred(judged[usable, :, judge]) for judge in (0, 1))
    spread, noise = _deviation(first), _deviation(first - second) / np.sqrt(2)
    audit, best_of_n_audited = None, None
    judged_by_it = np.isfinite(audited[usable]).any(axis=1) if audited is not None else np.zeros(0, bool)
    if audited is not None and judged_by_it.any():
        reward, auditor = first[judged_by_it], _centred(audited[usable][judged_by_it])
        audit, best_of_n_audited = _correlation(reward, auditor), best_of(reward, auditor).mean(axis=0).tolist()
    judges = best_of(first, second)
    seen = judges[:, -1]
    return Gate(
        sessions=int(usable.sum()),
        spread=float(spread.mean()),
        noise=float(noise.mean()),
        reliability=_correlation(first, second),
        agreement=float(seen.mean()),
        agreement_error=_standard_error(seen, np.asarray(users)[usable]),
        best_of_n=best_of(first, first).mean(axis=0).tolist(),
        best_of_n_judged=judges.mean(axis=0).tolist(),
        spread_by_session=spread.tolist(),
        noise_by_session=noise.tolist(),
        audit=audit,
        best_of_n_audited=best_of_n_audited,
    )


def best_of(choosing: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What one sees in the query that another prefers among the first n valid ones.

    Args:
        choosing, seen: float [S, N], nan where a query is not valid; every session has a valid one.

    Returns:
        float64 [S, N]: of n = 1 … N.
    """
    chosen = []
    for n in range(1, choosing.shape[1] + 1):
        choice = np.nanargmax(np.where(_leading(choosing, n), choosing, np.nan), axis=1)
        chosen.append(np.take_along_axis(seen, choice[:, None], axis=1)[:, 0])
    return np.stack(chosen, axis=1)


def _standard_error(values: np.ndarray, users: np.ndarray) -> float:
    """Of the mean, linearised over users: they are independent, their sessions are not."""
    _, of = np.unique(users, return_inverse=True)
    sums = np.bincount(of, weights=values - values.mean())
    if len(sums) < 2:
        return float("nan")
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of rewards that are centred within sessions; 0 where one of them does not vary."""
    scale = np.sqrt(np.nansum(first**2) * np.nansum(second**2))
    return float(np.nansum(first * second) / scale) if scale > 0 else 0.0


def _centred(reward: np.ndarray) -> np.ndarray:
    return reward - np.nanmean(reward, axis=1, keepdims=True)


def _deviation(centred: np.ndarray) -> np.ndarray:
    """Standard deviation [S] within each session (ddof 1)."""
    return np.sqrt(np.nansum(centred**2, axis=1) / (np.isfinite(centred).sum(axis=1) - 1))


def _leading(values: np.ndarray, n: int) -> np.ndarray:
    """The first n valid entries of each row."""
    valid = np.isfinite(values)
    return valid & (valid.cumsum(axis=1) <= n)
