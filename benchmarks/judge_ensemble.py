"""Do several judges choose better queries than one? What a choice is worth in rankers that took no part in it.

    rgalign compare --config alignment --run-dir runs/alignment --set compare.seeds=1 --set reward.judge_seeds=5 \\
        --set compare.rows=[qe_rec,rg_sft]
    python -m benchmarks.judge_ensemble runs/alignment/seed_0

Judges are rankers of the same sessions under different seeds. For every number of them, all sets of that size choose
the best of the first N queries by their mean reward, and the rankers that are left, as the one that is trained next,
say what the choice is truly worth: the expected CTR@k of what they rank first, above the mean of the session's queries.
Intervals are of 95 %, over users.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.query_worth import true_values
from rgalign_ray.evaluate.statistics import Estimate, stratified_bootstrap
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.loop import round_sessions
from rgalign_ray.loop.rank_stages import judge_names
from rgalign_ray.ranker import scoring
from rgalign_ray.reward.actor import QueryUnit
from rgalign_ray.reward.functions import Labels
from rgalign_ray.reward.gate import best_of
from rgalign_ray.reward.judging import judge_queries
from rgalign_ray.world.oracle import Oracle

FEW = 4
"""Queries of a session, unless set otherwise."""


@dataclass(frozen=True)
class Judged:
    """Queries of sessions that have at least two valid ones, by every judge."""

    users: list[str]
    rewards: np.ndarray
    """float64 [S, N, J], nan where a query is not valid."""
    values: np.ndarray
    """float64 [S, N, J]: true CTR@k of each judge's ranking with the query, above the mean of the session's queries."""

    @classmethod
    def load(cls, run_dir: str) -> Judged:
        """Of a run's first round.

        Raises:
            ConfigError: where the run has fewer than three judges.
        """
        settings = config.Config.model_validate(storage.read_json(storage.join(run_dir, "config.json")))
        names = [name for (name,) in judge_names(settings)]
        if len(names) < 3:
            raise ConfigError(f"{run_dir}: has {len(names)} judges; make it with reward.judge_seeds=3 or more.")
        uris = [storage.join(run_dir, "rankers_0", name) for name in names]
        judges, rankers = ([scoring.load(uri, use) for uri in uris] for use in ("log", settings.evaluate.rank_by))
        catalogue = Catalogue.load(storage.join(run_dir, "sessions"))
        oracle = Oracle.load(storage.join(run_dir, "log"))
        units = list(round_sessions.sampled_units(storage.join(run_dir, "rollouts_1")))
        users: list[str] = []
        rewards, values = [], []
        with progress.track("judge", len(units), "units") as advance:
            for sessions, rollouts_uri, embeddings_uri in units:
                unit, sessions = QueryUnit.load(rollouts_uri, embeddings_uri), sessions.sort_by("session_id")
                arrays = examples(sessions, judges[0].space, catalogue)
                labels = Labels.of(settings.reward, sessions, arrays, catalogue)
                its = [judge_queries(judge, arrays, labels, unit.embeddings, settings.reward)[0] for judge in judges]
                true = [
                    true_values(ranker, sessions, unit.embeddings, catalogue, oracle, settings.evaluate.k).queries
                    for ranker in rankers
                ]
                rewards.append(np.where(unit.valid[..., None], np.stack(its, axis=-1), np.nan))
                values.append(np.where(unit.valid[..., None], np.stack(true, axis=-1), np.nan))
                users += sessions["user_id"].to_pylist()
                advance(1)
        reward, value = np.concatenate(rewards), np.concatenate(values)
        usable = np.isfinite(reward[..., 0]).sum(axis=1) >= 2
        value = value[usable] - np.nanmean(value[usable], axis=1, keepdims=True)
        return cls([user for user, its in zip(users, usable, strict=True) if its], reward[usable], value)


def worth(judged: Judged, size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """True value [S] of the best of n by `size` judges: in their own rankings, and in those of the others."""
    everyone = range(judged.rewards.shape[-1])
    own, others = [], []
    for judges in combinations(everyone, size):
        rest = [judge for judge in everyone if judge not in judges]
        reward = judged.rewards[..., list(judges)].mean(axis=-1)
        own.append(best_of(reward, judged.values[..., list(judges)].mean(axis=-1))[:, n - 1])
        others.append(best_of(reward, judged.values[..., rest].mean(axis=-1))[:, n - 1])
    return np.mean(own, axis=0), np.mean(others, axis=0)


def measure(run_dir: Annotated[str, typer.Argument(help="Of a run, or of a comparison's seed.")]) -> None:
    """Print what the choice of more and more judges is worth."""
    judged = Judged.load(run_dir)
    queries, judges = judged.rewards.shape[1:]

    def told(values: np.ndarray) -> str:
        found: Estimate = stratified_bootstrap([values], [judged.users], weights=[None])
        return f"{found.mean:+.4f} [{found.users[0]:+.4f}, {found.users[1]:+.4f}]"

    for n in dict.fromkeys((min(FEW, queries), queries)):
        title = f"best of {n}: true CTR above the mean of a session's queries, {len(judged.users)} sessions"
        table = Table("judges", "for other rankers", "over one judge", "for themselves", title=title)
        for size in range(1, judges):
            own, others = worth(judged, size, n)
            gain = told(others - worth(judged, 1, n)[1]) if size > 1 else ""
            table.add_row(str(size), told(others), gain, told(own))
        Console().print(table)


if __name__ == "__main__":
    command.run(measure)
