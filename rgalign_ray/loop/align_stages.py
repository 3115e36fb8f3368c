"""Stages of one round that learn: what is selected of the judged queries, and the objectives that learn from it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from rgalign_ray import schema, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import DataError
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import PAIRS, POSITIVES, SELECTED, FrozenPair, LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import session_keys
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import model_card, on_policy, round_sessions
from rgalign_ray.loop.judge_stages import SCORED
from rgalign_ray.loop.readers import engine_spec, reasoner_stage
from rgalign_ray.loop.stage import KEY_LETTERS, Outcome, Run, Stage
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
LEARNS_FROM = {"sft": SELECTED, "dpo": PAIRS}
"""Table of an objective of the text; those of the embedding learn from `POSITIVES`."""
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


ORDER = [("session_id", "ascending"), ("sample", "ascending")]


@dataclass(frozen=True)
class _Judged:
    """The rewards of a round, part after part; within a part by session and sample."""

    session_ids: list[str]
    reward: np.ndarray
    """float32 [S, N]; nan for queries that were not valid."""
    uplift: np.ndarray
    """float32 [S, N]."""
    parts: dict[str, slice]
    """Sessions of each part."""

    @classmethod
    def load(cls, run: Run, round_: int) -> _Judged:
        ids: list[str] = []
        rewards, uplifts, parts = [], [], {}
        for name, files in round_sessions.by_part(run.uri(f"rewards_{round_}", SCORED)).items():
            scored = _sorted(files, ["session_id", "sample", "reward", "uplift"])
            own = list(dict.fromkeys(scored["session_id"].to_pylist()))
            parts[name] = slice(len(ids), len(ids) + len(own))
            ids += own
            rewards.append(scored["reward"].to_numpy().reshape(len(own), -1))
            uplifts.append(scored["uplift"].to_numpy().reshape(len(own), -1))
        return cls(ids, np.concatenate(rewards), np.concatenate(uplifts), parts)


@dataclass(frozen=True)
class _Part:
    """Sessions and rollouts of one part, sorted alike."""

    catalogue: Catalogue
    sessions: pa.Table
    rollouts: pa.Table
    candidates: np.ndarray
    """int [S, C]."""
    clicks: np.ndarray
    """bool [S, C], those that teach."""

    @classmethod
    def load(cls, run: Run, round_: int, name: str, files: list[str], catalogue: Catalogue) -> _Part:
        place = run.uri(f"rollouts_{round_}", round_sessions.FOLDER, f"{name}.parquet")
        sessions, rollouts = storage.read_table(place), _sorted(files)
        candidates = catalogue.candidates(sessions)
        arrays = {
            "candidates": candidates,
            "clicks": catalogue.padded(sessions["clicks"], candidates),
            "session_key": session_keys(sessions["session_id"].to_pylist()),
        }
        clicks = Labels.of(run.config.reward, sessions, arrays, catalogue).clicks
        return cls(catalogue, sessions, rollouts, candidates, clicks)

    @property
    def prompts(self) -> pa.Table:
        """The first rollout of each session: `session_id` and `prompt_ids`."""
        n = self.rollouts.num_rows // self.sessions.num_rows
        first = self.rollouts.select(["session_id", "prompt_ids"]).take(pa.array(np.arange(0, len(self.rollouts), n)))
        assert first["session_id"].equals(self.sessions["session_id"]), "both hold the part's sessions, sorted"
        return first


def _sorted(files: list[str], columns: list[str] | None = None) -> pa.Table:
    return pa.concat_tables([storage.read_table(file, columns=columns) for file in files]).sort_by(ORDER)


def choose(run: Run, out: str, round_: int) -> Outcome:
    """Writes what each objective learns from, a file a part: `selected`, `pairs`, and `positives`, which has every
    session.
    """
    config = run.config
    judged = _Judged.load(run, round_)
    seeds = np.array([sample_seed(config.seed, round_, session, -1) for session in judged.session_ids])
    reward = among_first(judged.reward, config.select.n)
    titled = config.select.method == "title"
    if titled:
        chosen, paired = np.zeros(len(reward), np.int64), np.full((len(reward), 2), -1)
    else:
        chosen, paired = select(reward, judged.uplift, config.select, seeds), pairs(reward, config.select, seeds)
    taken = np.flatnonzero(chosen >= 0)
    worth = np.ones(len(reward), np.float32)
    if config.select.weight == "uplift" and not titled:
        worth[taken] = judged.uplift[taken, chosen[taken]]
        taken = taken[resampled(worth[taken], sample_seed(config.seed, round_, "weights", -1))]
    rank = (reward > np.take_along_axis(reward, chosen[:, None], axis=1)).sum(axis=1)
    sources = Counter[str]()
    catalogue = Catalogue.load(run.uri("sessions"))
    files = round_sessions.by_part(run.uri(f"rollouts_{round_}", "rollouts"))
    for name, rows in judged.parts.items():
        part = _Part.load(run, round_, name, files[name], catalogue)
        own = taken[(taken >= rows.start) & (taken < rows.stop)]
        if titled:
            selected = titles(run, part)
        else:
            picked = part.rollouts.take(pa.array((own - rows.start) * reward.shape[1] + chosen[own]))
            sources.update(picked["source"].to_pylist())
            selected = pa.table(
                [
                    *(picked[column] for column in ("session_id", "prompt_ids", "completion_ids", "query")),
                    pa.array(worth[own], pa.float32()),
                    pa.array(rank[own], pa.int32()),
                ],
                schema=schema.SELECTED,
            )
        for table, folder in (
            (selected, SELECTED),
            (pair_table(part.rollouts, reward[rows], paired[rows]), PAIRS),
            (positives(part, selected), POSITIVES),
        ):
            storage.write_table(storage.join(out, folder, f"{name}.parquet"), table)
    counts = {"sessions": len(reward), "selected": len(taken)}
    if titled:
        return Outcome(counts)
    gain = np.take_along_axis(reward, chosen[:, None], axis=1)[taken, 0] - np.nanmean(reward[taken], axis=1)
    return Outcome(
        counts | {"pairs": int((paired[:, 0] >= 0).sum()), "taught nothing": len(reward) - len(np.unique(taken))},
        {
            "gain_over_mean": float(gain.mean()) if len(taken) else 0.0,
            "lift": float(np.nanmean(judged.uplift)),
            "chosen_by_source": dict(sources),
        },
    )


def titles(run: Run, part: _Part) -> pa.Table:
    """`schema.SELECTED` with the title of each session's first clicked intent in place of a query."""
    clicked = np.take_along_axis(part.candidates, part.clicks.argmax(axis=1)[:, None], axis=1)[:, 0]
    names = [part.catalogue.titles[intent] for intent in clicked]
    tokenizer = models.load_tokenizer(run.config.reasoner.model)
    suffix = Template.load(run.config.prompt.template).suffix
    return pa.table(
        [
            *part.prompts.columns,
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


def positives(part: _Part, selected: pa.Table) -> pa.Table:
    """A row per session: its prompt, its selected query's tokens (null: none), and its clicked intents by index."""
    query = dict(zip(selected["session_id"].to_pylist(), selected["completion_ids"].to_pylist(), strict=True))
    prompts = part.prompts
    return pa.table(
        {
            "session_id": prompts["session_id"],
            "prompt_ids": prompts["prompt_ids"],
            "completion_ids": pa.array([query.get(i) for i in prompts["session_id"].to_pylist()], pa.list_(pa.int32())),
            "positives": pa.array(
                [row[clicked].tolist() for row, clicked in zip(part.candidates, part.clicks, strict=True)],
                pa.list_(pa.int32()),
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
            sessions=run.uri(f"rollouts_{round_}", round_sessions.FOLDER),
            log=run.uri("sessions"),
            reward=config.reward,
        ),
        prompt=config.prompt,
        rollout=config.rollout,
        out=out,
        version=f"{config.reasoner.model}+{round_}.{objective}@{run.stage_key[:KEY_LETTERS]}",
        seed=config.seed * 1000 + round_,
    )
    table = storage.join(task.data, LEARNS_FROM.get(objective, POSITIVES))
    rows = storage.read_table(table, columns=["session_id"]).num_rows
    if not rows:
        raise DataError(
            f"align_{round_}_{objective}: no session to learn from; lower select.margin or raise rollout.n."
        )
    steps = math.ceil(rows / optimisation.batch_sessions) * optimisation.epochs
    name, records = f"{objective}_{round_}", run.records
    if objective == "grpo" and config.grpo.sampler == "pool":
        figures = on_policy.fit(task, config, steps, records, name)
    else:
        figures = training.fit(task, steps, records, name)
    model_card.write(run, out, f"align_{round_}_{objective}", round_, objective, weights, figures)
    return Outcome({"sessions": figures["sessions"], "steps": figures["steps"]}, figures)
