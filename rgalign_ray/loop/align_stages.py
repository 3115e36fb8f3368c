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
from rgalign_ray.hashing import session_keys
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import PAIRS, POSITIVES, SELECTED, FrozenPair, LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template, neutral
from rgalign_ray.loop import model_card, on_policy, round_sessions
from rgalign_ray.loop.judge_stages import SCORED
from rgalign_ray.loop.rank_stages import reward_names
from rgalign_ray.loop.readers import engine_spec, reasoner_stage
from rgalign_ray.loop.stage import KEY_LETTERS, Outcome, Run, Stage
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import sample_seed, written
from rgalign_ray.reward.functions import Labels
from rgalign_ray.reward.selection import among_first, pairs, resampled, select

LEARNS_FROM = {"sft": SELECTED, "dpo": PAIRS}
"""Table of an objective of the text; those of the embedding learn from `POSITIVES`."""


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
                f"{model_card.OBJECTIVES[objective][0]} on DeepSpeed, ZeRO {config.learner.zero_stage}",
                partial(align, objective=objective, round_=round_, weights=previous),
                ("reasoner", "learner", objective),  # prompts, sampling and reward stand in the keys of the inputs
                tuple(inputs),
                ray=True,
            )
        )
        previous = name
    return sequence


ORDER = [("session_id", "ascending"), ("sample", "ascending")]


@dataclass(frozen=True)
class _Rewards:
    """The rewards of a part, by session and sample."""

    session_ids: list[str]
    reward: np.ndarray
    """float32 [S, N] of those among which is chosen; nan for the others, and where a query was not valid."""
    uplift: np.ndarray
    """float32 [S, N] of all; nan where a query was not valid."""

    @classmethod
    def load(cls, config: Config, files: list[str]) -> _Rewards:
        scored = _sorted(files, ["session_id", "sample", "reward", "uplift"])
        ids = list(dict.fromkeys(scored["session_id"].to_pylist()))
        reward, uplift = (scored[name].to_numpy().reshape(len(ids), -1) for name in ("reward", "uplift"))
        return cls(ids, among_first(reward, config.select.n), uplift)

    def seeds(self, config: Config, round_: int) -> np.ndarray:
        return np.array([sample_seed(config.seed, round_, session, -1) for session in self.session_ids])


@dataclass(frozen=True)
class _Choices:
    """What is chosen in a whole round: some bytes a session, since choices are weighed against each other."""

    sample: dict[str, np.ndarray]
    """By part, int [S]: number of the chosen query, -1 where a session teaches nothing."""
    rows: dict[str, np.ndarray]
    """By part, int, in order: the sessions that teach; one that weighs more stands there several times."""
    worth: dict[str, np.ndarray]
    """By part, float32 [S]: by which they are weighed."""

    @classmethod
    def of(cls, config: Config, round_: int, scored: dict[str, list[str]]) -> _Choices:
        by_uplift = config.select.weight == "uplift" and config.select.method != "title"
        sample, worth = {}, {}
        for name, files in scored.items():
            judged = _Rewards.load(config, files)
            if config.select.method == "title":
                sample[name] = np.zeros(len(judged.session_ids), np.int64)
            else:
                sample[name] = select(judged.reward, judged.uplift, config.select, judged.seeds(config, round_))
            chosen = np.take_along_axis(judged.uplift, sample[name][:, None], axis=1)[:, 0]
            worth[name] = chosen if by_uplift else np.ones(len(chosen), np.float32)
        rows = {name: np.flatnonzero(chosen >= 0) for name, chosen in sample.items()}
        if by_uplift:
            names = list(rows)
            part = np.concatenate([np.full(len(rows[name]), number) for number, name in enumerate(names)])
            place = np.concatenate(list(rows.values()))
            weights = np.concatenate([worth[name][rows[name]] for name in names])
            again = resampled(weights, sample_seed(config.seed, round_, "weights", -1))
            rows = {name: place[again[part[again] == number]] for number, name in enumerate(names)}
        return cls(sample, rows, worth)


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
    titled = config.select.method == "title"
    scored, rollouts = (
        round_sessions.by_part(run.uri(stage, folder))
        for stage, folder in ((f"rewards_{round_}", SCORED), (f"rollouts_{round_}", "rollouts"))
    )
    choices = _Choices.of(config, round_, scored)
    catalogue = Catalogue.load(run.uri("sessions"))
    counts, sources = Counter[str](), Counter[str]()
    gains, uplifts = [np.empty(0)], [np.empty(0)]
    for name, files in scored.items():
        part, judged = _Part.load(run, round_, name, rollouts[name], catalogue), _Rewards.load(config, files)
        reward, sample, rows = judged.reward, choices.sample[name], choices.rows[name]
        if titled:
            selected, paired = titles(run, part), np.full((len(reward), 2), -1)
        else:
            paired = pairs(reward, judged.uplift, config.select, judged.seeds(config, round_))
            picked = part.rollouts.take(pa.array(rows * reward.shape[1] + sample[rows]))
            sources.update(picked["source"].to_pylist())
            chosen = np.take_along_axis(reward, sample[:, None], axis=1)
            selected = pa.table(
                [
                    *(picked[column] for column in ("session_id", "prompt_ids", "completion_ids", "query")),
                    pa.array(choices.worth[name][rows], pa.float32()),
                    pa.array((reward > chosen).sum(axis=1)[rows], pa.int32()),
                ],
                schema=schema.SELECTED,
            )
            gains.append(chosen[rows, 0] - np.nanmean(reward[rows], axis=1))
            uplifts.append(np.nansum(judged.uplift, axis=1, dtype=np.float64))
            counts["valid"] += int(np.isfinite(judged.uplift).sum())
        counts.update(sessions=len(sample), selected=len(rows))
        counts.update({"pairs": int((paired[:, 0] >= 0).sum()), "taught nothing": len(sample) - len(np.unique(rows))})
        for table, folder in (
            (selected, SELECTED),
            (pair_table(part.rollouts, reward, paired), PAIRS),
            (positives(part, selected), POSITIVES),
        ):
            storage.write_table(storage.join(out, folder, f"{name}.parquet"), table)
    if titled:
        return Outcome({name: counts[name] for name in ("sessions", "selected")})
    gain, lift = (math.fsum(np.concatenate(parts)) for parts in (gains, uplifts))  # the same however it is parted
    return Outcome(
        {name: counts[name] for name in ("sessions", "selected", "pairs", "taught nothing")},
        {
            "gain_over_mean": gain / max(counts["selected"], 1),
            "lift": lift / max(counts["valid"], 1),
            "chosen_by_source": dict(sources),
        },
    )


def titles(run: Run, part: _Part) -> pa.Table:
    """`schema.SELECTED` with the title of each session's first clicked intent in place of a query."""
    clicked = np.take_along_axis(part.candidates, part.clicks.argmax(axis=1)[:, None], axis=1)[:, 0]
    names = [neutral(part.catalogue.titles[intent]) for intent in clicked]
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
            rankers=tuple(run.uri(f"rankers_{round_ - 1}", name) for name in reward_names(config)),
            encoder=engine_spec(run, round_ - 1).weights,
            sessions=run.uri(f"rollouts_{round_}", round_sessions.FOLDER),
            log=run.uri("sessions"),
            reward=config.reward,
        ),
        prompt=config.prompt,
        template=Template.load(config.prompt.template),
        rollout=config.rollout,
        out=out,
        version=f"{config.reasoner.model}+{round_}.{objective}@{run.stage_key[:KEY_LETTERS]}",
        seed=config.seed * 1000 + round_,
    )
    table = storage.join(task.data, LEARNS_FROM.get(objective, POSITIVES))
    rows = storage.read_table(table, columns=["session_id"]).num_rows
    learns = rows
    if "prompt" not in getattr(optimisation, "readouts", ["prompt"]):
        learns -= storage.read_table(table, columns=["completion_ids"])["completion_ids"].null_count
    if not learns:
        gap = "select.pair_gap" if objective == "dpo" else "select.margin"
        raise DataError(f"align_{round_}_{objective}: no session to learn from; lower {gap} or raise rollout.n.")
    steps = math.ceil(rows / optimisation.batch_sessions) * optimisation.epochs
    name, records = f"{objective}_{round_}", run.records
    if objective == "grpo" and config.grpo.sampler == "pool":
        figures = on_policy.fit(task, config, steps, records, name)
    else:
        figures = training.fit(task, steps, records, name)
    model_card.write(run, out, f"align_{round_}_{objective}", round_, objective, weights, figures)
    return Outcome({"sessions": figures["sessions"], "steps": figures["steps"]}, figures)
