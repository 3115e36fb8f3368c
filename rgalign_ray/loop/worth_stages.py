"""What a round's choice among queries is truly worth: a stage of evaluation, from which nothing learns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.evaluate import query_worth
from rgalign_ray.evaluate.report import QueryWorth
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.loop import round_sessions
from rgalign_ray.loop.judge_stages import SCORED
from rgalign_ray.loop.rank_stages import judge_names
from rgalign_ray.loop.stage import Outcome, Run, Stage, truth_inputs
from rgalign_ray.ranker import scoring
from rgalign_ray.reward.actor import QueryUnit
from rgalign_ray.world.oracle import Oracle

WORTH = "worth.parquet"


def stages(config: Config, round_: int) -> list[Stage]:
    """worth_r, where the truth is known, and one ranker that has not learned from the round's users is the reward."""
    if not truth_inputs(config) or config.crossfit:
        return []
    made = (f"rollouts_{round_}", f"rewards_{round_}", f"rankers_{round_ - 1}")
    return [
        Stage(
            f"worth_{round_}",
            "hold the choice among queries against the truth",
            partial(judge, round_=round_),
            ("evaluate", "reward.judge_seeds"),
            ("sessions", *made, *truth_inputs(config)),
        )
    ]


def judge(run: Run, out: str, round_: int) -> Outcome:
    """Writes `worth.parquet`: what `query_worth.chosen` finds of every session with two valid queries."""
    assert run.truth is not None, "the stage exists where the truth is known"
    names = judge_names(run.config)
    uris = [run.uri(f"rankers_{round_ - 1}", name) for name in (*names[0], *names[-1])]
    rankers = [scoring.load(uri, run.config.evaluate.rank_by) for uri in uris]
    catalogue, oracle = Catalogue.load(run.uri("sessions")), Oracle.load(run.truth)
    parts = []
    for sessions, rollouts_uri, embeddings_uri in round_sessions.sampled_units(run.uri(f"rollouts_{round_}")):
        unit = QueryUnit.load(rollouts_uri, embeddings_uri)
        for ranker in rankers:
            ranker.require(reasoner_version=unit.reasoner_version, intent_ids=catalogue.ids)
        scored = storage.read_table(run.uri(f"rewards_{round_}", SCORED, storage.pure_path(rollouts_uri).name))
        reward = scored["reward"].to_numpy().reshape(len(unit.session_ids), -1)
        usable = np.isfinite(reward).sum(axis=1) >= 2
        if usable.any():
            kept = sessions.filter(pa.array(usable))
            own, held_out = (
                query_worth.true_values(ranker, kept, unit.embeddings[usable], catalogue, oracle, run.config.evaluate.k)
                for ranker in rankers
            )
            found = query_worth.chosen(reward[usable], own, held_out)
            columns = {name: pa.array(list(each)) for name, each in found.items()}
            parts.append(pa.table({name: kept[name] for name in ("session_id", "user_id")} | columns))
    table = pa.concat_tables(parts)
    storage.write_table(storage.join(out, WORTH), table)
    return Outcome({"sessions": table.num_rows})


def query_worth_of(runs: Sequence[Run], round_: int) -> QueryWorth | None:
    """What the stage found, over runs of several seeds; None where it does not exist."""
    first = runs[0].config
    if not stages(first, round_):
        return None
    tables = [storage.read_table(run.uri(f"worth_{round_}", WORTH)) for run in runs]
    seeds = [
        (
            table["user_id"].to_pylist(),
            {name: np.array(table[name].to_pylist()) for name in (*query_worth.CURVES, query_worth.NULL)},
        )
        for table in tables
    ]
    return query_worth.summarise(first.evaluate.k, seeds, first.evaluate)
