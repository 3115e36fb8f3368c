"""Stages of one round of alignment: rollouts, rewards, the selection, and the objectives that learn from it."""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from rgalign_ray import progress, schema, storage
from rgalign_ray.config import Config, Teacher
from rgalign_ray.errors import DataError
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import FrozenPair, LearnerTask
from rgalign_ray.logs import examples, stream
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.audit_stages import AUDITOR
from rgalign_ray.loop.rank_stages import engine_spec, judge_names, reasoner_stage
from rgalign_ray.loop.stage import TRAIN_RECORDS, Outcome, Run, Stage
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import sample_seed, written
from rgalign_ray.reasoner.teachers import TeacherSpec
from rgalign_ray.reward import actor
from rgalign_ray.reward.auditor import AuditorSpec
from rgalign_ray.reward.functions import RESOLVED
from rgalign_ray.reward.gate import gate
from rgalign_ray.reward.selection import pairs, select
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, ProposalWorker, Proposed, Unit

SESSIONS_FILE = "sessions.parquet"
"""The round's sessions with a click, beside their rollouts."""
ENDPOINT_ANSWERS = ".answers"
"""Folder of a run that keeps the answers of paid endpoints, whatever becomes of the stage that asked."""
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
    """rollouts_r → rewards_r → selected_r → align_r_…"""
    return [*judging_stages(config, round_), *learning_stages(config, round_)]


def judging_stages(config: Config, round_: int) -> list[Stage]:
    """What every objective of a round learns from: queries, and what they are worth."""
    before = round_ - 1
    previous = reasoner_stage(config, before)
    return [
        Stage(
            f"rollouts_{round_}",
            f"sample {config.rollout.n + sum(teacher.n for teacher in config.teachers)} queries a session",
            partial(roll_out, round_=round_),
            ("rollout", "teachers", "prompt", "reasoner"),
            ("sessions", "features", *((previous,) if previous else ())),
            ray=True,
            units=True,
        ),
        Stage(
            f"rewards_{round_}",
            "judge them with the frozen ranker",
            partial(judge, round_=round_),
            ("reward", *(("prompt", "compare.encoder", "compare.max_text_tokens") if config.roles.audit else ())),
            ("sessions", f"rollouts_{round_}", f"rankers_{before}", *((AUDITOR,) if config.roles.audit else ())),
            ray=True,
        ),
    ]


def learning_stages(config: Config, round_: int) -> list[Stage]:
    """selected_r → align_r_…, one stage an objective, each starting from the one before."""
    before = round_ - 1
    previous = reasoner_stage(config, before)
    sequence = [
        Stage(
            f"selected_{round_}",
            f"select: {config.select.method}",
            partial(choose, round_=round_),
            ("select", *(("reasoner.model", "prompt") if config.select.method == "title" else ())),
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


def roll_out(run: Run, out: str, round_: int) -> Outcome:
    config = run.config
    template = Template.load(config.prompt.template)
    variants = {teacher.name: Template.load(teacher.template or config.prompt.template) for teacher in config.teachers}
    sessions, without_click = align_sessions(run, round_, [template, *variants.values()])
    storage.write_table(storage.join(out, SESSIONS_FILE), sessions)
    proposed = [ask(run, out, teacher, variants[teacher.name], sessions, round_) for teacher in config.teachers]
    units = cut(sessions["session_id"].to_pylist(), template.sessions(sessions), config.rollout.unit_sessions)
    if proposed:
        units = [
            replace(unit, proposed=[[one for asked in proposed for one in asked[i]] for i in unit.session_ids])
            for unit in units
        ]
    engine = engine_spec(run, round_ - 1)
    pool = RolloutPool(
        config.rollout,
        {
            "engine": engine,
            "instruction": Instruction(template.prefix, template.suffix, template.version),
            "settings": config.rollout,
            "run_seed": config.seed,
            "round_": round_,
            "out_uri": out,
        },
    )
    context = storage.content_key(config.rollout.model_dump(), template.key, engine.weights, round_)
    run_pool(pool, units, context, "rollouts", f"sessions x {config.rollout.n}")
    made = storage.read_table(storage.join(out, "rollouts"), columns=["source", "fault"])
    faults, sources = Counter(made["fault"].to_pylist()), Counter(made["source"].to_pylist())
    rows = {"sessions": sessions.num_rows, "rollouts": len(made), "sessions without a click left out": without_click}
    reasons = {reason: count for reason, count in sorted(faults.items(), key=str) if reason is not None}
    valid = Counter(made.filter(pc.is_null(made["fault"]))["source"].to_pylist())
    return Outcome(
        rows,
        {
            "faults": reasons,
            "valid_rate": faults[None] / len(made),
            "valid_rate_by_source": {source: valid[source] / count for source, count in sources.items()},
            "worker_deaths": pool.deaths,
        },
    )


def ask(
    run: Run, out: str, teacher: Teacher, template: Template, sessions: pa.Table, round_: int
) -> dict[str, list[Proposed]]:
    """What one teacher proposes for each session."""
    config = run.config
    place = storage.join(out, ProposalWorker.TABLE, teacher.name)
    settings = config.rollout
    if teacher.engine == "openai":  # it waits for answers, many at a time: one process does
        settings = settings.model_copy(update={"workers": 1})
    spec = TeacherSpec(
        teacher, config.reasoner, config.rollout, config.prompt.max_session_tokens, run.uri(ENDPOINT_ANSWERS)
    )
    pool = RolloutPool(
        settings,
        {
            "teacher": spec,
            "instruction": Instruction(template.prefix, template.suffix, template.version),
            "run_seed": config.seed,
            "round_": round_,
            "out_uri": place,
        },
        ProposalWorker,
    )
    units = cut(sessions["session_id"].to_pylist(), template.sessions(sessions), settings.unit_sessions)
    context = storage.content_key(teacher.model_dump(), config.rollout.model_dump(), template.key, round_)
    run_pool(pool, units, context, f"teacher {teacher.name}", f"sessions x {teacher.n}")
    table = storage.read_table(storage.join(place, ProposalWorker.TABLE))
    temperature = teacher.temperature or config.rollout.temperature
    found: dict[str, list[Proposed]] = {}
    for row in table.to_pylist():
        one = Proposed(teacher.name, row["query"], row["finish"] or "", template.version, temperature)
        found.setdefault(row["session_id"], []).append(one)
    return found


def run_pool(pool: RolloutPool, units: list[Unit], context: str, label: str, unit: str) -> None:
    """Runs units to their end, with progress in sessions."""
    try:
        with progress.track(label, sum(len(each.session_ids) for each in units), unit) as advance:
            for _, count in pool.run(units, context):
                advance(count)
    finally:
        pool.close()


def align_sessions(run: Run, round_: int, templates: list[Template]) -> tuple[pa.Table, int]:
    """Sessions of role align_r with a click, sorted by id, and how many have none: no click, no reward.

    Their columns are those that prompts, rankers and rewards read.

    Raises:
        DataError: when none has a click.
    """
    role, uri = f"align_{round_}", run.uri("sessions")
    space = FeatureSpace.from_dict(storage.read_json(run.uri("features", "features.json")))
    there = examples.column_names(uri)
    optional = [name for name in (RESOLVED,) if name in there]
    read = [name for template in templates for name in template.columns]
    columns = dict.fromkeys([*read, *examples.columns(space, there), *optional])
    batches = list(stream.batches(stream.sessions(uri, columns=list(columns), roles=[role])))
    table = pa.concat_tables(batches).sort_by("session_id") if batches else None
    clicked = [any(clicks) for clicks in table["clicks"].to_pylist()] if table is not None else []
    if table is None or not any(clicked):
        raise DataError(f"role {role}: no session with a click; raise roles.align or the number of sessions.")
    return table.filter(pa.array(clicked)), clicked.count(False)


def cut(session_ids: list[str], texts: list[str], size: int) -> list[Unit]:
    """Work units of sessions whose texts are of like length, so that little of a batch is padding."""
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), session_ids[row]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [Unit([session_ids[row] for row in chunk], [texts[row] for row in chunk]) for chunk in chunks]


def judge(run: Run, out: str, round_: int) -> Outcome:
    config = run.config
    rankers = [run.uri(f"rankers_{round_ - 1}", name) for name in judge_names(config)]
    sessions = storage.read_table(run.uri(f"rollouts_{round_}", SESSIONS_FILE))
    place = {session: row for row, session in enumerate(sessions["session_id"].to_pylist())}
    folder = run.uri(f"rollouts_{round_}")
    files = storage.list_files(storage.join(folder, "rollouts"), ".parquet")

    def requests() -> Iterator[tuple[pa.Table, str, str]]:
        for file in files:
            ids = storage.read_table(file, columns=["session_id"])["session_id"].unique().to_pylist()
            rows = sessions.take(pa.array([place[session] for session in ids]))
            yield rows, file, storage.join(folder, "embeddings", posixpath.basename(file))

    auditor = None
    if config.roles.audit:
        reads = config.compare
        auditor = AuditorSpec(run.uri(AUDITOR, AUDITOR), reads.encoder, reads.max_text_tokens, config.prompt.template)
    model = actor.remote(config.reward.cpus, rankers, run.uri("sessions"), config.reward, auditor)
    with progress.track("rewards", len(files), "units") as advance:
        results = []
        for result in actor.score_all(model, requests()):
            results.append(result)
            advance(1)
    ray.kill(model)
    scored = pa.concat_tables([table for table, _ in results])
    judged = np.concatenate([rewards for _, rewards in results])
    storage.write_table(storage.join(out, "scored.parquet"), scored)
    rows = {"rollouts": scored.num_rows, "valid": pc.sum(scored["valid"]).as_py()}
    audited = scored["audit"].to_numpy().reshape(judged.shape[:2]) if auditor else None
    return Outcome(rows, {"gate": asdict(gate(judged, audited))})


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
    if config.select.method == "title":
        selected = titles(run, round_, rollouts, n)
        storage.write_table(storage.join(out, LEARNS_FROM["sft"]), selected)
        storage.write_table(storage.join(out, POSITIVES), positives(run, round_, rollouts, selected, n))
        return Outcome({"sessions": len(ids), "selected": len(selected)})
    chosen = select(reward, uplift, config.select, seeds)
    rank = (reward > np.take_along_axis(reward, chosen[:, None], axis=1)).sum(axis=1)
    taken = np.flatnonzero(chosen >= 0)
    picked = rollouts.take(pa.array(taken * n + chosen[taken]))
    selected = pa.table(
        [
            *(picked[name] for name in ("session_id", "prompt_ids", "completion_ids", "query")),
            pa.array(np.ones(len(taken)), pa.float32()),
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
        {"sessions": len(ids), "selected": len(taken), "pairs": len(paired), "taught nothing": len(ids) - len(taken)},
        {
            "gain_over_mean": float(gain.mean()) if len(taken) else 0.0,
            "lift": float(np.nanmean(uplift)),
            "chosen_by_source": dict(Counter(picked["source"].to_pylist())),
        },
    )


def titles(run: Run, round_: int, rollouts: pa.Table, n: int) -> pa.Table:
    """`schema.SELECTED` with the title of each session's first clicked intent in place of a query."""
    catalogue = Catalogue.load(run.uri("sessions"))
    sessions = storage.read_table(run.uri(f"rollouts_{round_}", SESSIONS_FILE))
    candidates = catalogue.candidates(sessions)
    clicks = catalogue.padded(sessions["clicks"], candidates)
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
    catalogue = Catalogue.load(run.uri("sessions"))
    sessions = storage.read_table(run.uri(f"rollouts_{round_}", SESSIONS_FILE))
    candidates = catalogue.candidates(sessions)
    clicks = catalogue.padded(sessions["clicks"], candidates)
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
