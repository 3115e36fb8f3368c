"""Alignments of a comparison: what all of a seed learn from, what each makes, and what the report tells of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import takewhile
from typing import Any

import numpy as np

from rgalign_ray import storage
from rgalign_ray.config import Config, RowName, changed
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate import diagnosis, query_worth
from rgalign_ray.evaluate.examples import example_sessions
from rgalign_ray.evaluate.ladder import TestSessions
from rgalign_ray.evaluate.report import Diagnosis, Report, Written
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import align_stages, audit_stages, judge_stages, rank_stages, summary, worth_stages
from rgalign_ray.loop.ladder_rows import ALIGNMENTS, ROWS, LadderRow, jobs_of, rows_of_each, slice_name
from rgalign_ray.loop.stage import Run, Stage
from rgalign_ray.rollout.encode import written_queries

FROZEN = "frozen reasoner"
LEAK = "leak"


def read_by(rows: Sequence[RowName]) -> list[str]:
    """The alignments that rows read, each once."""
    return list(dict.fromkeys(name for row in rows if (name := ROWS[row].aligned)))


def teaching(config: Config) -> list[Stage]:
    """What all alignments of a seed learn from: the reward's judges, the auditor, queries and rewards."""
    return [
        rank_stages.pair_stage(config),
        *audit_stages.making_stages(config),
        *judge_stages.stages(config, 1),
        *worth_stages.stages(config, 1),
    ]


def aligning(job: Run, name: str) -> list[Stage]:
    """One alignment: what it selects, its objectives, and the sessions as its reasoner reads them.

    One that learns from other sessions than the rest (`crossfit`) has queries and rewards of its own.
    """
    config = settings_of(job.config, name)
    judged = judge_stages.stages(config, 1) if config.crossfit != job.config.crossfit else []
    return [*judged, *align_stages.stages(config, 1), *rank_stages.reading_stages(config, 1)]


def settings_of(config: Config, name: str) -> Config:
    """The settings that make an alignment.

    Raises:
        ConfigError: where they contradict the rest.
    """
    if name == LEAK and config.crossfit:
        raise ConfigError("compare.rows: rgalign_leak shows what crossfit avoids; set crossfit to 0 for it.")
    return changed(config, ALIGNMENTS[name])


def run_of(job: Run, name: str) -> Run:
    """One alignment under one seed, in a folder of its own; what others share stands in the seed's, and what another
    begins with as this one does in the other's.
    """
    settings = settings_of(job.config, name)
    own = {stage.name for stage in aligning(job, name)}
    before = {"sessions", "items", "features", "log", "embeddings_0"}
    shared = before | {stage.name for stage in teaching(settings)} - own
    begun = {stage: storage.join(_folder(job, other), stage) for stage, other in _begun(job, name).items()}
    return replace(
        job,
        config=settings.model_copy(update={"run_dir": _folder(job, name)}),
        elsewhere={stage: job.uri(stage) for stage in shared} | begun,
    )


def _folder(job: Run, name: str) -> str:
    return storage.join(job.config.run_uri, f"aligned_{name}")


def _begun(job: Run, name: str) -> dict[str, str]:
    """The stages, up to its last objective in common, that an alignment named before makes alike; and that one's name.

    What learns from the same choice by the same objectives is the same, so that RG-SFT, say, is run once for the row of
    its own and for all that go on from it.
    """

    def settles(changes: Mapping[str, Any], setting: str) -> Any:
        return changes.get(setting, reduce(getattr, setting.split("."), job.config))

    own = ALIGNMENTS[name]
    for other, theirs in ALIGNMENTS.items():
        if other == name:
            break
        both = zip(settles(own, "align"), settles(theirs, "align"), strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
        apart = (own.keys() | theirs.keys()) - {"align"}
        if common and all(settles(own, setting) == settles(theirs, setting) for setting in apart):
            stages = align_stages.stages(settings_of(job.config, name), 1)
            return {stage.name: other for stage in stages[: 1 + common]}
    return {}


def with_alignments(jobs: Sequence[Run], rows: Sequence[RowName], made: Report) -> Report:
    """The comparison's report with the reward of its alignments, where each is lost, and what each writes."""
    names = read_by(rows)
    if not names:
        return made
    config = jobs[0].config
    rewards = [job.manifest("rewards_1").figures["gate"] for job in jobs]
    rollouts = [job.manifest("rollouts_1") for job in jobs]
    valid = [manifest.figures["valid_rate"] for manifest in rollouts]
    worth = worth_stages.query_worth_of(jobs, 1)
    diagnoses = {row: _diagnosis(jobs, row) for row in rows if has_diagnosis(ROWS[row])}
    # a warm start would say what the row that it differs from has said
    told = [found for row, found in diagnoses.items() if ROWS[row].variant_of not in diagnoses]
    lines = [*made.summary, *(diagnosis.sentence(found) for found in told)]
    lines += [*summary.unjudged(rollouts), *still_written(jobs, rows)]
    if config.roles.audit:
        lines.append(audit_stages.hearing_sentence([job.manifest(audit_stages.AUDITOR) for job in jobs]))
    as_configured = any("align" not in ALIGNMENTS[name] for name in names)
    objectives = {"RGAlign-Rec's objectives": " + ".join(config.align)} if as_configured else {}
    return made.model_copy(
        update={
            "facts": made.facts | objectives,
            "reward": summary.reward_gate(rewards, valid),
            "worth": worth,
            "diagnoses": list(diagnoses.values()),
            "written": _written(*max(rows_of_each(jobs, rows), key=lambda each: len(each[1]))),
            "summary": [*lines, *([query_worth.sentence(worth)] if worth else [])],
        }
    )


def still_written(jobs: Sequence[Run], rows: Sequence[RowName]) -> list[str]:
    """The share of valid queries among those that each reasoner writes as it reads sessions: a sentence, if it does."""
    read = {FROZEN: [job.manifest("embeddings_0") for job in jobs]}
    for name in read_by(rows):
        aligned = max((jobs_of(row, jobs) for row in rows if ROWS[row].aligned == name), key=len)
        read[_title(name, rows)] = [run_of(job, name).manifest("embeddings_1") for job in aligned]
    found = {
        title: sum(it.rows["valid"] for it in manifests) / sampled
        for title, manifests in read.items()
        if (sampled := sum(it.rows["sampled"] for it in manifests))
    }
    told = ", ".join(f"{title} {share:.1%}" for title, share in found.items())
    return (
        [f"Valid latent queries, of those that each reasoner writes for the sessions it reads: {told}."] if told else []
    )


def has_diagnosis(row: LadderRow) -> bool:
    """Whether a row says where its alignment is lost: it has trained rankers on what the alignment made of its
    sessions; a shuffled row reads those of others.
    """
    return row.aligned is not None and row.retrained and row.ranker_of is None and not row.shuffled


def _diagnosis(jobs: Sequence[Run], row: RowName) -> Diagnosis:
    """Over seeds, and what is read over the rankers of each."""
    aligned = ROWS[row].aligned
    assert aligned is not None, "asked of rows with an aligned reasoner"
    slices = [slice_name(row, number) for number in range(jobs[0].config.compare.trainings)]
    seeds = []
    for run in (run_of(job, aligned) for job in jobs_of(row, jobs)):
        first, *others = (Diagnosis.model_validate(run.manifest(name).figures["diagnosis"]) for name in slices)
        read = float(np.mean([found.read for found in (first, *others)]))
        seeds.append(first.model_copy(update={"read": read}))
    return diagnosis.averaged(seeds)


def _title(name: str, rows: Sequence[RowName]) -> str:
    """An alignment, called by a row that reads it: a competitor before a control."""
    reading = [ROWS[row] for row in rows if ROWS[row].aligned == name]
    return min(reading, key=lambda row: (not row.retrained, row.ranker_of is not None, row.control)).title


def examples(run: Run, test: TestSessions, embeddings_uri: str) -> list[dict[str, str | None]]:
    """Texts of the example sessions, and what the reasoner of some embeddings wrote for each; None: nothing valid."""
    ids = example_sessions(run.uri("sessions"), run.truth, run.config.evaluate)
    texts = Template.load(run.config.prompt.template).sessions(test.table.take([test.ids.index(i) for i in ids]))
    queries = written_queries(embeddings_uri)
    return [{"session": text, "query": queries.get(i)} for i, text in zip(ids, texts, strict=True)]


def _written(job: Run, rows: Sequence[RowName]) -> list[Written]:
    """The queries that each reasoner of a seed writes for the same sessions, as its rows have kept them."""
    wrote = {}
    for reasoner in (None, *read_by(rows)):
        reading = [row for row in rows if ROWS[row].reads == "reasoner" and ROWS[row].aligned == reasoner]
        if reading:
            run = run_of(job, reasoner) if reasoner else job
            name = _title(reasoner, rows) if reasoner else FROZEN
            wrote[name] = run.manifest(f"row_{reading[0]}").figures["wrote"]
    sessions = [each["session"] for each in next(iter(wrote.values()))]
    return [
        Written(session=text, queries={name: found[number]["query"] for name, found in wrote.items()})
        for number, text in enumerate(sessions)
    ]
