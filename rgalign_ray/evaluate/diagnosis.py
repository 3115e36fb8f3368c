"""Where an alignment is lost: four questions, each with a figure, from the reward to the ranker that reads the result.

  is the reward informative within a session? ──▶ does the policy move? ──▶ does the embedding move? ──▶ is it read?

The first that is answered with nothing explains why the rest cannot gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rgalign_ray.evaluate.report import Diagnosis


def diagnose(
    name: str,
    gate: Mapping[str, float],
    queries: tuple[Mapping[str, str], Mapping[str, str]],
    embeddings: tuple[np.ndarray, np.ndarray],
    read: tuple[str, float],
) -> Diagnosis:
    """The four figures of one round.

    Args:
        name: of the round.
        gate: `agreement` and `agreement_error` of the reward's gate.
        queries: of sessions, before and after, sampled with the same random numbers.
        embeddings: e(x) float [S, D] of the same sessions, before and after.
        read: a metric, and what the retrained ranker reaches in it through the sessions' own queries above what it
            does through other users'.
    """
    before, after = queries
    both = [session for session in before if session in after]
    return Diagnosis(
        name=name,
        informative=gate["agreement"],
        informative_error=gate["agreement_error"],
        queries=len(both),
        queries_changed=float(np.mean([before[i] != after[i] for i in both])) if both else float("nan"),
        moved=moved(*embeddings),
        common=common(*embeddings),
        read=read[1],
        read_metric=read[0],
    )


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """How far embeddings [S, D] moved apart from one another, in units of the distance between two sessions.

    sqrt(tr Cov(after − before) / (2 tr Cov(before))): a shift that is the same for all sessions counts nothing, and 1
    means as far as from one session to another.
    """
    before, after = before.astype(np.float64), after.astype(np.float64)
    return float(np.sqrt((after - before).var(axis=0).sum() / (2 * before.var(axis=0).sum())))


def common(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the squared movement of embeddings [S, D] that one vector makes: |E d|² / E |d|², d = after − before; 0
    where nothing moved.
    """
    movement = after.astype(np.float64) - before.astype(np.float64)
    whole = (movement**2).sum(axis=1).mean()
    return float((movement.mean(axis=0) ** 2).sum() / whole) if whole else 0.0


def averaged(seeds: Sequence[Diagnosis]) -> Diagnosis:
    """The mean over seeds; `queries` are those of all."""
    errors = [found.informative_error for found in seeds]

    def mean(name: str) -> float:
        return float(np.mean([getattr(found, name) for found in seeds]))

    return seeds[0].model_copy(
        update={name: mean(name) for name in ("informative", "queries_changed", "moved", "common", "read")}
        | {
            "informative_error": float(np.sqrt(np.sum(np.square(errors))) / len(errors)),
            "queries": sum(found.queries for found in seeds),
        }
    )


def sentence(found: Diagnosis) -> str:
    """The four answers in one line."""
    changed = f"{found.queries_changed:.0%} of {found.queries:,} queries changed"
    if not found.queries:
        changed = "no query was read before and after"
    return (
        f"{found.name}: of a session's best query another judge confirms {found.informative:+.4f} ± "
        f"{found.informative_error:.4f} in reward; {changed}; embeddings moved {found.moved:.2f} of the distance "
        f"between sessions, beside {found.common:.0%} of the movement that is the same for all; the ranker reads "
        f"{found.read:+.4f} {found.read_metric} from them that it does not read from another user's (test sessions)."
    )
