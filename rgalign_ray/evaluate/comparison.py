"""Rankers over several seeds: what each gave session by session, and what may be claimed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from rgalign_ray import config, storage
from rgalign_ray.evaluate.ladder import SessionMetrics, TestSessions
from rgalign_ray.evaluate.statistics import Estimate, bootstrap, ratio_bootstrap, stratified_bootstrap

WEIGHT = "weight of "
"""Before a metric's name: the column of its sessions' weights, where they are not all 1."""


@dataclass(frozen=True)
class Verdict:
    """One row of the ladder under one seed, on that seed's test sessions."""

    sessions: list[str]
    users: list[str]
    regions: list[str]
    values: dict[str, np.ndarray]
    """By metric, float64 [S], nan where a session does not count."""
    weights: dict[str, np.ndarray]

    @classmethod
    def of(cls, test: TestSessions, judged: SessionMetrics) -> Verdict:
        return cls(test.ids, test.users, test.table["region"].to_pylist(), judged.values, judged.weights)

    @classmethod
    def mean(cls, verdicts: Sequence[Verdict]) -> Verdict:
        """Of several rankers on the same sessions, metric by metric."""
        first = verdicts[0]
        assert all(each.sessions == first.sessions for each in verdicts), "judged on the same sessions"
        values = {name: np.mean([each.values[name] for each in verdicts], axis=0) for name in first.values}
        return replace(first, values=values)

    def save(self, uri: str) -> None:
        columns = {"session_id": self.sessions, "user_id": self.users, "region": self.regions, **self.values}
        storage.write_table(uri, pa.table(columns | {WEIGHT + name: w for name, w in self.weights.items()}))

    @classmethod
    def load(cls, uri: str) -> Verdict:
        table = storage.read_table(uri)
        sessions, users, regions, *names = table.column_names
        columns = {name: table[name].to_numpy() for name in names}
        return cls(
            table[sessions].to_pylist(),
            table[users].to_pylist(),
            table[regions].to_pylist(),
            {name: values for name, values in columns.items() if not name.startswith(WEIGHT)},
            {name.removeprefix(WEIGHT): values for name, values in columns.items() if name.startswith(WEIGHT)},
        )


def estimate(row: Sequence[Verdict], metric: str, settings: config.Evaluate) -> Estimate:
    """A metric of one row, a verdict a seed: its mean over seeds and both intervals."""
    return _estimate(row, [verdict.values[metric] for verdict in row], metric, settings)


def estimate_in(row: Sequence[Verdict], metric: str, region: str, settings: config.Evaluate) -> Estimate | None:
    """As `estimate`, of one region's sessions; None where some seed has none of them."""
    values = [np.where(np.array(v.regions) == region, v.values[metric], np.nan) for v in row]
    if any(np.isnan(value).all() for value in values):
        return None
    return _estimate(row, values, metric, settings)


def difference(
    ours: Sequence[Verdict], baseline: Sequence[Verdict], metric: str, settings: config.Evaluate
) -> Estimate:
    """The paired difference ours − baseline of a metric; verdict s of both is of the same seed.

    Raises:
        ValueError: when the two were not judged on the same sessions.
    """
    return _estimate(ours, _gaps(ours, baseline, metric), metric, settings)


def share_of_gap(
    ours: Sequence[Verdict],
    baseline: Sequence[Verdict],
    ceiling: Sequence[Verdict] | float,
    metric: str,
    settings: config.Evaluate,
) -> Estimate:
    """(ours − baseline) / (ceiling − baseline): the share of the headroom that is closed.

    With a ceiling of 1 it is the relative error reduction, (g − b) / (1 − b).

    Raises:
        ValueError: when the rows were not judged on the same sessions.
    """
    gains = _gaps(ours, baseline, metric)
    if isinstance(ceiling, float):
        room = [ceiling - verdict.values[metric] for verdict in baseline]
    else:
        room = _gaps(ceiling, baseline, metric)
    strata = range(len(ours))
    if _same_sessions(ours):  # one set of users, whatever the seed: drawn once
        gains, room, strata = [np.mean(gains, axis=0)], [np.mean(room, axis=0)], range(1)
    return ratio_bootstrap(
        gains,
        room,
        [ours[stratum].users for stratum in strata],
        weights=[ours[stratum].weights.get(metric) for stratum in strata],
        repetitions=settings.bootstrap,
        confidence=settings.confidence,
    )


def _gaps(ours: Sequence[Verdict], baseline: Sequence[Verdict], metric: str) -> list[np.ndarray]:
    """ours − baseline, session by session, an entry a seed."""
    for mine, other in zip(ours, baseline, strict=True):
        if mine.sessions != other.sessions:
            raise ValueError("paired rows must be judged on the same sessions.")
    return [mine.values[metric] - other.values[metric] for mine, other in zip(ours, baseline, strict=True)]


def _estimate(row: Sequence[Verdict], values: list[np.ndarray], metric: str, settings: config.Evaluate) -> Estimate:
    """Of values, session by session, a list entry a seed, with the row's users and weights."""
    weights = [verdict.weights.get(metric) for verdict in row]
    if _same_sessions(row):
        return bootstrap(
            np.stack(values),
            row[0].users,
            weights=weights[0],
            repetitions=settings.bootstrap,
            confidence=settings.confidence,
        )
    return stratified_bootstrap(
        values,
        [verdict.users for verdict in row],
        weights=weights,
        repetitions=settings.bootstrap,
        confidence=settings.confidence,
    )


def _same_sessions(row: Sequence[Verdict]) -> bool:
    """Whether all seeds were judged on one log; a shop is drawn anew for each."""
    return all(verdict.sessions == row[0].sessions for verdict in row)
