"""Stages of one round that judge: latent queries, by the policy and its teachers, and what they are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow.compute as pc
import ray

from rgalign_ray import progress, storage
from rgalign_ray.config import Config, Rollout, Teacher
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import round_sessions
from rgalign_ray.loop.audit_stages import AUDITOR, auditor_spec
from rgalign_ray.loop.log_stages import check_templates
from rgalign_ray.loop.rank_stages import SENTENCE_READER, judge_names
from rgalign_ray.loop.readers import engine_spec, interpreter, reasoner_stage
from rgalign_ray.loop.stage import Outcome, Run, Stage
from rgalign_ray.reasoner.teachers import TeacherSpec
from rgalign_ray.reward import actor
from rgalign_ray.reward.gate import Gate, gate
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, ProposalWorker, Proposed, Unit

SCORED = "scored"
"""Folder of judged queries, a file a work unit."""
GATE_ROLLOUTS = 500_000
"""Judged queries that tell whether the reward can."""
ENDPOINT_ANSWERS = ".answers"
"""Folder of a run that keeps the answers of paid endpoints, whatever becomes of the stage that asked."""


def stages(config: Config, round_: int) -> list[Stage]:
    """rollouts_r → rewards_r, which every objective of the round learns from."""
    before = round_ - 1
    previous = reasoner_stage(config, before)
    return [
        Stage(
            f"rollouts_{round_}",
            f"sample {config.rollout.n + sum(teacher.n for teacher in config.teachers)} queries a session",
            partial(roll_out, round_=round_),
            ("rollout", "teachers", "prompt", "reasoner", "crossfit"),
            ("sessions", "features", *((previous,) if previous else ())),
            ray=True,
            units=True,
        ),
        Stage(
            f"rewards_{round_}",
            "judge them with the frozen ranker",
            partial(judge, round_=round_),
            ("reward", *(SENTENCE_READER if config.roles.audit else ())),
            ("sessions", f"rollouts_{round_}", f"rankers_{before}", *((AUDITOR,) if config.roles.audit else ())),
            ray=True,
            units=True,
        ),
    ]


def roll_out(run: Run, out: str, round_: int) -> Outcome:
    config = run.config
    check_templates(run)
    template = Template.load(config.prompt.template)
    variants = {teacher.name: Template.load(teacher.template or config.prompt.template) for teacher in config.teachers}
    sessions, without_click = round_sessions.write(run, out, round_, [template, *variants.values()])
    teacher_deaths = 0
    for teacher in config.teachers:
        teacher_deaths += propose(run, out, teacher, variants[teacher.name], sessions, round_)
    engine = replace(engine_spec(run, round_ - 1), reasoner=config.reasoner)
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
        python=interpreter(config, config.reasoner.engine),
    )
    context = storage.content_key(sampling(config), template.key, engine.weights, round_)
    units = round_sessions.units(out, template, config.rollout.unit_sessions)
    if config.teachers:
        units = with_proposals(units, out, config, variants)
    run_pool(pool, units, context, "rollouts", sessions, f"sessions x {config.rollout.n}")
    round_sessions.drop(out, pool.quarantined)
    faults: Counter[str | None] = Counter()
    made, valid = Counter[str](), Counter[str]()
    for file in storage.list_files(storage.join(out, "rollouts"), ".parquet"):
        table = storage.read_table(file, columns=["source", "fault"])
        faults.update(table["fault"].to_pylist())
        made.update(table["source"].to_pylist())
        valid.update(table.filter(pc.is_null(table["fault"]))["source"].to_pylist())
    aside = {"sessions set aside": len(pool.quarantined)} if pool.quarantined else {}
    rows = {
        "sessions": sessions - len(pool.quarantined),
        "rollouts": made.total(),
        "sessions without a click left out": without_click,
        **aside,
    }
    return Outcome(
        rows,
        {
            "faults": {reason: count for reason, count in sorted(faults.items(), key=str) if reason is not None},
            "valid_rate": faults[None] / made.total(),
            "valid_rate_by_source": {source: valid[source] / count for source, count in made.items()},
            "worker_deaths": pool.deaths + teacher_deaths,
        },
    )


def sampling(config: Config) -> dict:
    """Those settings of rollouts that decide what is sampled."""
    return config.rollout.model_dump(exclude=set(Rollout.ASIDE))


def propose(run: Run, out: str, teacher: Teacher, template: Template, sessions: int, round_: int) -> int:
    """Has one teacher propose queries for each session; returns how many of its workers died."""
    config = run.config
    settings = config.rollout
    if teacher.engine == "openai":  # it waits for answers, many at a time: one process does
        settings = settings.model_copy(update={"workers": 1, "min_workers": 1})
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
            "out_uri": proposals_folder(out, teacher),
        },
        ProposalWorker,
        interpreter(config, teacher.engine),
    )
    context = storage.content_key(teacher.model_dump(), sampling(config), template.key, round_)
    units = round_sessions.units(out, template, settings.unit_sessions)
    run_pool(pool, units, context, f"teacher {teacher.name}", sessions, f"sessions x {teacher.n}")
    return pool.deaths


def proposals_folder(out: str, teacher: Teacher) -> str:
    return storage.join(out, ProposalWorker.TABLE, teacher.name)


def with_proposals(units: Iterator[Unit], out: str, config: Config, variants: dict[str, Template]) -> Iterator[Unit]:
    """The units with what every teacher wrote for their sessions; one part's proposals are in memory at a time."""
    files = {
        teacher.name: round_sessions.by_part(storage.join(proposals_folder(out, teacher), ProposalWorker.TABLE))
        for teacher in config.teachers
    }
    part, found = "", {}
    for unit in units:
        if unit.part != part:
            part = unit.part
            found = {
                teacher.name: _proposed(files[teacher.name].get(part, []), teacher, variants[teacher.name], config)
                for teacher in config.teachers
            }
        proposed = [
            [
                one
                for teacher in config.teachers
                # of a session that was set aside as the teacher's worker died over it
                for one in found[teacher.name].get(session) or [_unasked(teacher, variants[teacher.name])] * teacher.n
            ]
            for session in unit.session_ids
        ]
        yield replace(unit, proposed=proposed)


def _proposed(files: list[str], teacher: Teacher, template: Template, config: Config) -> dict[str, list[Proposed]]:
    """What one teacher proposes for each session of a part."""
    temperature = teacher.temperature or config.rollout.temperature
    found: dict[str, list[Proposed]] = {}
    for file in files:
        for row in storage.read_table(file).to_pylist():
            one = Proposed(teacher.name, row["query"], row["finish"] or "", template.version, temperature)
            found.setdefault(row["session_id"], []).append(one)
    return found


def _unasked(teacher: Teacher, template: Template) -> Proposed:
    return Proposed(teacher.name, None, "", template.version, teacher.temperature or 0.0)


def run_pool(pool: RolloutPool, units: Iterator[Unit], context: str, label: str, sessions: int, unit: str) -> None:
    """Runs units to their end, with progress in sessions."""
    try:
        with progress.track(label, sessions, unit) as advance:
            for _, count in pool.run(units, context):
                advance(count)
    finally:
        pool.close()
    if pool.quarantined:
        progress.note(f"{label}: {len(pool.quarantined)} sessions set aside, which ended every worker that read them")


def judge(run: Run, out: str, round_: int) -> Outcome:
    config, rolled_out, scored = run.config, run.uri(f"rollouts_{round_}"), storage.join(out, SCORED)
    rankers = [[run.uri(f"rankers_{round_ - 1}", name) for name in folds] for folds in judge_names(config)]
    auditor = auditor_spec(run) if config.roles.audit else None
    made = storage.list_files(storage.join(rolled_out, "rollouts"), ".parquet")
    units = {storage.pure_path(file).stem for file in made}
    storage.keep_units(scored, units)
    there = {storage.pure_path(file).stem for file in storage.list_files(scored, ".parquet")}
    missing = (
        each for each in round_sessions.sampled_units(rolled_out) if storage.pure_path(each[1]).stem not in there
    )
    workers = min(config.reward.workers, len(units) - len(there))
    models = [actor.remote(rankers, run.uri("sessions"), config.reward, auditor) for _ in range(workers)]
    try:
        with progress.track("rewards", len(units), "units", before=len(there)) as advance:
            for (_, file, _), table in actor.score_all(models, missing):
                storage.write_table(storage.join(scored, storage.pure_path(file).name), table)
                advance(1)
    finally:
        for model in models:
            ray.kill(model)
    files = storage.list_files(scored, ".parquet")
    rows = Counter[str]()
    for file in files:
        valid = storage.read_table(file, columns=["valid"])["valid"]
        rows.update({"rollouts": len(valid), "valid": pc.sum(valid).as_py()})
    return Outcome(dict(rows), {"gate": asdict(_gate(files, rolled_out, with_audit=auditor is not None))})


def _gate(files: list[str], rolled_out: str, *, with_audit: bool) -> Gate:
    """The gate's figures, from as many units all over the round as hold `GATE_ROLLOUTS`: a longer one takes no more."""
    judged, audits, users, rollouts = [], [], [], 0
    for file in sorted(files, key=lambda file: storage.pure_path(file).stem.rpartition("-")[2]):  # a hash
        table = storage.read_table(file, columns=["session_id", "reward", "second", "audit"])
        ids = pc.unique(table["session_id"]).to_pylist()
        user_of = round_sessions.users(rolled_out, storage.pure_path(file).stem)
        users += [user_of[session] for session in ids]
        shape = (len(ids), -1)
        reward, second, audit = (table[name].to_numpy().reshape(shape) for name in ("reward", "second", "audit"))
        judged.append(np.stack([reward, second], axis=-1).astype(np.float64))
        audits.append(audit.astype(np.float64))
        rollouts += len(table)
        if rollouts >= GATE_ROLLOUTS:
            break
    return gate(np.concatenate(judged), users, np.concatenate(audits) if with_audit else None)
