"""Stages of one round that judge: latent queries, by the policy and its teachers, and what they are worth."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from rgalign_ray import progress, storage
from rgalign_ray.config import Config, Teacher
from rgalign_ray.errors import DataError
from rgalign_ray.logs import examples, lists, stream
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.audit_stages import AUDITOR, auditor_spec
from rgalign_ray.loop.rank_stages import engine_spec, judge_names, reasoner_stage
from rgalign_ray.loop.stage import Outcome, Run, Stage
from rgalign_ray.reasoner.teachers import TeacherSpec
from rgalign_ray.reward import actor
from rgalign_ray.reward.functions import RESOLVED
from rgalign_ray.reward.gate import gate
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, ProposalWorker, Proposed, Unit

SESSIONS_FILE = "sessions.parquet"
"""The round's sessions with a click, beside their rollouts."""
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
            ("reward", *(("prompt", "compare.encoder", "compare.max_text_tokens") if config.roles.audit else ())),
            ("sessions", f"rollouts_{round_}", f"rankers_{before}", *((AUDITOR,) if config.roles.audit else ())),
            ray=True,
        ),
    ]


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
        interpreter(config, teacher.engine),
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


def interpreter(config: Config, engine: str) -> str | None:
    """Of the workers that sample with an engine, where it is not this one."""
    return config.reasoner.vllm.python if engine == "vllm" else None


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

    With `crossfit` they are those of role rank. With 1, which is there to show a leak, they are no more than role
    align_r has, where it has any: what more sessions are worth is another question.

    Their columns are those that prompts, rankers and rewards read, and their users.

    Raises:
        DataError: when none has a click.
    """
    fresh, uri = f"align_{round_}", run.uri("sessions")
    role = "rank" if run.config.crossfit else fresh
    space = FeatureSpace.from_dict(storage.read_json(run.uri("features", "features.json")))
    there = examples.column_names(uri)
    optional = [name for name in (RESOLVED,) if name in there]
    read = [name for template in templates for name in template.columns]
    columns = dict.fromkeys(["user_id", *read, *examples.columns(space, there), *optional])
    batches = list(stream.batches(stream.sessions(uri, columns=list(columns), roles=[role])))
    table = pa.concat_tables(batches).sort_by("session_id") if batches else None
    clicked = lists.any_true(table["clicks"]) if table is not None else np.zeros(0, bool)
    if table is None or not clicked.any():
        raise DataError(f"role {role}: no session with a click; raise roles.{role[:5]} or the number of sessions.")
    kept = table.filter(pa.array(clicked))
    like = run.manifest("sessions").figures["roles"].get(fresh, 0)
    if run.config.crossfit == 1 and like:
        first = np.sort(
            np.argsort(examples.session_keys(kept["session_id"].to_pylist()))[: round(like * np.mean(clicked))]
        )
        kept = kept.take(pa.array(first))
    return kept, int((~clicked).sum())


def cut(session_ids: list[str], texts: list[str], size: int) -> list[Unit]:
    """Work units of sessions whose texts are of like length, so that little of a batch is padding."""
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), session_ids[row]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [Unit([session_ids[row] for row in chunk], [texts[row] for row in chunk]) for chunk in chunks]


def unit_files(run: Run, round_: int) -> Iterator[tuple[pa.Table, str, str]]:
    """The round's work units: their sessions in order of id, the file of their queries, and that of e(x,q)."""
    folder = run.uri(f"rollouts_{round_}")
    sessions = storage.read_table(storage.join(folder, SESSIONS_FILE))
    place = {session: row for row, session in enumerate(sessions["session_id"].to_pylist())}
    for file in storage.list_files(storage.join(folder, "rollouts"), ".parquet"):
        ids = sorted(set(storage.read_table(file, columns=["session_id"])["session_id"].to_pylist()))
        rows = sessions.take(pa.array([place[session] for session in ids]))
        yield rows, file, storage.join(folder, "embeddings", posixpath.basename(file))


def judge(run: Run, out: str, round_: int) -> Outcome:
    config = run.config
    rankers = [[run.uri(f"rankers_{round_ - 1}", name) for name in folds] for folds in judge_names(config)]
    units = len(storage.list_files(run.uri(f"rollouts_{round_}", "rollouts"), ".parquet"))
    auditor = auditor_spec(run) if config.roles.audit else None
    model = actor.remote(config.reward.cpus, rankers, run.uri("sessions"), config.reward, auditor)
    with progress.track("rewards", units, "units") as advance:
        results = []
        for result in actor.score_all(model, unit_files(run, round_)):
            results.append(result)
            advance(1)
    ray.kill(model)
    scored = pa.concat_tables([table for table, _ in results])
    judged = np.concatenate([rewards for _, rewards in results])
    storage.write_table(storage.join(out, "scored.parquet"), scored)
    rows = {"rollouts": scored.num_rows, "valid": pc.sum(scored["valid"]).as_py()}
    audited = scored["audit"].to_numpy().reshape(judged.shape[:2]) if auditor else None
    return Outcome(rows, {"gate": asdict(gate(judged, audited))})
