"""Stages of one round that learn: what is selected of the judged queries, and the objectives that learn from it."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa

from rgalign_ray import schema, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import DataError
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import FrozenPair, LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import session_keys
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.judge_stages import SESSIONS_FILE
from rgalign_ray.loop.rank_stages import engine_spec, reasoner_stage
from rgalign_ray.loop.stage import TRAIN_RECORDS, Outcome, Run, Stage
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import sample_seed, written
from rgalign_ray.reward.functions import Labels
from rgalign_ray.reward.selection import among_first, pairs, resampled, select

OBJECTIVE_NAMES = {
    "sft": "RG-SFT",
    "dpo": "RG-DPO",
    "grpo": "RG-GRPO",
    "contrastive": "RG-CL",
    "gradient": "ranking gradient",
    "latent": "latent RL",
}
LEARNS_FROM = {"sft": "selected.parquet", "dpo": "pairs.parquet"}
"""Table of an objective of the text; those of the embedding learn from `POSITIVES`."""
POSITIVES = "positives.parquet"
ASKS = {"latent": ("reward",), "grpo": ("reward", "prompt", "rollout")}
"""Settings of objectives that ask for rewards as they learn."""


def stages(config: Config, round_: int) -> list[Stage]:
    """selected_r → align_r_…, one stage an objective, each starting from the one before."""
    before = round_ - 1
    previous = reasoner_stage(config, before)
    sequence = [
        Stage(
            f"selected_{round_}",
            f"select: {config.select.method}",
            partial(choose, round_=round_),
            ("select", "reward.halves", *(("reasoner.model", "prompt") if config.select.method == "title" else ())),
            ("sessions", f"rollouts_{round_}", f"rewards_{round_}"),
        ),
    ]
    for objective in config.align:
        name = f"align_{round_}_{objective}"
        inputs = [f"selected_{round_}", *((previous,) if previous else ())]
        if objective not in LEARNS_FROM:
            inputs += [f"rankers_{before}", "sessions", f"rollouts_{round_}"]
        sequence.append(
            Stage(
                name,
                f"{OBJECTIVE_NAMES[objective]} on DeepSpeed, ZeRO {config.learner.zero_stage}",
                partial(align, objective=objective, round_=round_, weights=previous),
                ("reasoner", "learner", objective, *ASKS.get(objective, ())),
                tuple(inputs),
                ray=True,
            )
        )
        previous = name
    return sequence


def choose(run: Run, out: str, round_: int) -> Outcome:
    """Writes what each objective learns from: `selected.parquet`, `pairs.parquet`, and `positives.parquet`, which has
    every session.
    """
    config = run.config
    order = [("session_id", "ascending"), ("sample", "ascending")]
    scored = storage.read_table(run.uri(f"rewards_{round_}", "scored.parquet")).sort_by(order)
    rollouts = storage.read_table(run.uri(f"rollouts_{round_}", "rollouts")).sort_by(order)
    ids = list(dict.fromkeys(scored["session_id"].to_pylist()))
    reward, uplift = (scored[name].to_numpy().reshape(len(ids), -1) for name in ("reward", "uplift"))
    seeds = np.array([sample_seed(config.seed, round_, session, -1) for session in ids])
    n = reward.shape[1]
    reward = among_first(reward, config.select.n)
    if config.select.method == "title":
        selected = titles(run, round_, rollouts, n)
        storage.write_table(storage.join(out, LEARNS_FROM["sft"]), selected)
        storage.write_table(storage.join(out, POSITIVES), positives(run, round_, rollouts, selected, n))
        return Outcome({"sessions": len(ids), "selected": len(selected)})
    chosen = select(reward, uplift, config.select, seeds)
    rank = (reward > np.take_along_axis(reward, chosen[:, None], axis=1)).sum(axis=1)
    taken = np.flatnonzero(chosen >= 0)
    worth = np.ones(len(taken))
    if config.select.weight == "uplift":
        again = resampled(uplift[taken, chosen[taken]], sample_seed(config.seed, round_, "weights", -1))
        taken = taken[again]
        worth = uplift[taken, chosen[taken]]
    picked = rollouts.take(pa.array(taken * n + chosen[taken]))
    selected = pa.table(
        [
            *(picked[name] for name in ("session_id", "prompt_ids", "completion_ids", "query")),
            pa.array(worth, pa.float32()),
            pa.array(rank[taken], pa.int32()),
        ],
        schema=schema.SELECTED,
    )
    paired = pair_table(rollouts, reward, pairs(reward, config.select, seeds))
    storage.write_table(storage.join(out, LEARNS_FROM["sft"]), selected)
    storage.write_table(storage.join(out, LEARNS_FROM["dpo"]), paired)
    storage.write_table(storage.join(out, POSITIVES), positives(run, round_, rollouts, selected, n))
    gain = np.take_along_axis(reward, chosen[:, None], axis=1)[taken, 0] - np.nanmean(reward[taken], axis=1)
    return Outcome(
        {
            "sessions": len(ids),
            "selected": len(taken),
            "pairs": len(paired),
            "taught nothing": len(ids) - len(np.unique(taken)),
        },
        {
            "gain_over_mean": float(gain.mean()) if len(taken) else 0.0,
            "lift": float(np.nanmean(uplift)),
            "chosen_by_source": dict(Counter(picked["source"].to_pylist())),
        },
    )


def labelled(run: Run, round_: int) -> tuple[Catalogue, pa.Table, np.ndarray, np.ndarray]:
    """The catalogue, the round's sessions, their candidates int [S, C], and bool [S, C] the clicks that teach."""
    catalogue = Catalogue.load(run.uri("sessions"))
    sessions = storage.read_table(run.uri(f"rollouts_{round_}", SESSIONS_FILE))
    candidates = catalogue.candidates(sessions)
    arrays = {
        "candidates": candidates,
        "clicks": catalogue.padded(sessions["clicks"], candidates),
        "session_key": session_keys(sessions["session_id"].to_pylist()),
    }
    return catalogue, sessions, candidates, Labels.of(run.config.reward, sessions, arrays, catalogue).clicks


def titles(run: Run, round_: int, rollouts: pa.Table, n: int) -> pa.Table:
    """`schema.SELECTED` with the title of each session's first clicked intent in place of a query."""
    catalogue, sessions, candidates, clicks = labelled(run, round_)
    clicked = np.take_along_axis(candidates, clicks.argmax(axis=1)[:, None], axis=1)[:, 0]
    names = [catalogue.titles[intent] for intent in clicked]
    tokenizer = models.load_tokenizer(run.config.reasoner.model)
    suffix = Template.load(run.config.prompt.template).suffix
    prompts = rollouts.take(pa.array(np.arange(0, rollouts.num_rows, n)))
    assert prompts["session_id"].equals(sessions["session_id"]), "both hold the round's sessions, sorted"
    return pa.table(
        [
            *(prompts[name] for name in ("session_id", "prompt_ids")),
            pa.array([written(tokenizer, name, suffix) for name in names], pa.list_(pa.int32())),
            pa.array(names, pa.string()),
            pa.array(np.ones(len(names)), pa.float32()),
            pa.array(np.zeros(len(names)), pa.int32()),
        ],
        schema=schema.SELECTED,
    )


def pair_table(rollouts: pa.Table, reward: np.ndarray, chosen: np.ndarray) -> pa.Table:
    """`schema.PAIRS` from the rollouts in order of session and sample, rewards [S, N] and pairs [S, 2]."""
    there = np.flatnonzero(chosen[:, 0] >= 0)
    better, worse = (rollouts.take(pa.array(there * reward.shape[1] + chosen[there, side])) for side in (0, 1))
    gap = reward[there, chosen[there, 0]] - reward[there, chosen[there, 1]]
    return pa.table(
        [
            *(better[name] for name in ("session_id", "prompt_ids", "completion_ids")),
            worse["completion_ids"],
            pa.array(gap, pa.float32()),
        ],
        schema=schema.PAIRS,
    )


def positives(run: Run, round_: int, rollouts: pa.Table, selected: pa.Table, n: int) -> pa.Table:
    """A row per session: its prompt, its selected query's tokens (null: none), and its clicked intents by index."""
    _, sessions, candidates, clicks = labelled(run, round_)
    query = dict(zip(selected["session_id"].to_pylist(), selected["completion_ids"].to_pylist(), strict=True))
    prompts = rollouts.take(pa.array(np.arange(0, rollouts.num_rows, n)))
    assert prompts["session_id"].equals(sessions["session_id"]), "both hold the round's sessions, sorted"
    return pa.table(
        {
            "session_id": sessions["session_id"],
            "prompt_ids": prompts["prompt_ids"],
            "completion_ids": pa.array(
                [query.get(i) for i in sessions["session_id"].to_pylist()], pa.list_(pa.int32())
            ),
            "positives": pa.array(
                [row[clicked].tolist() for row, clicked in zip(candidates, clicks, strict=True)], pa.list_(pa.int32())
            ),
        }
    )


def align(run: Run, out: str, objective: str, round_: int, weights: str | None) -> Outcome:
    config = run.config
    optimisation = getattr(config, objective)
    task = LearnerTask(
        objective=objective,
        reasoner=config.reasoner,
        learner=config.learner,
        optimisation=optimisation,
        weights=run.uri(weights) if weights else None,
        data=run.uri(f"selected_{round_}"),
        pair=FrozenPair(
            ranker=run.uri(f"rankers_{round_ - 1}", "qe_rec"),
            encoder=engine_spec(run, round_ - 1).weights,
            sessions=run.uri(f"rollouts_{round_}", SESSIONS_FILE),
            log=run.uri("sessions"),
            reward=config.reward,
        ),
        prompt=config.prompt,
        rollout=config.rollout,
        out=out,
        version=f"{config.reasoner.model}+{round_}.{objective}",
        seed=config.seed * 1000 + round_,
    )
    table = storage.join(task.data, LEARNS_FROM.get(objective, POSITIVES))
    rows = storage.read_table(table, columns=["session_id"]).num_rows
    if not rows:
        raise DataError(
            f"align_{round_}_{objective}: no session to learn from; lower select.margin or raise rollout.n."
        )
    steps = math.ceil(rows / optimisation.batch_sessions) * optimisation.epochs
    figures = training.fit(task, steps, run.uri(TRAIN_RECORDS), f"{objective}_{round_}")
    return Outcome({"sessions": figures["sessions"], "steps": figures["steps"]}, figures)
