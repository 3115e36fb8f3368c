"""The ladder: rankers side by side on the same sessions, over several seeds.

  for each seed:  log → sessions → features → texts read by a sentence encoder and by the frozen reasoner
  for each seed and alignment that a row reads:  the reward's judges, queries and rewards (shared)
                  → what it selects → its objectives → texts read by its reasoner
  for each seed and row:  train its rankers, judge them on that seed's test sessions     (a slice, a Ray task)
  for each seed and row that takes another's rankers:  judge those
  at the end:  one table, as text, CSV, Markdown and a page

A slice is a stage like any other: done once for its settings and inputs, and skipped when it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from rgalign_ray import progress, storage
from rgalign_ray.config import Config, Model, RowName
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.evaluate import report, report_page, report_text
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.evaluate.ladder import Rung, TestSessions
from rgalign_ray.logs.roles import align_roles
from rgalign_ray.loop import (
    alignments,
    connection,
    controller,
    evaluate_stages,
    judge_stages,
    ladder_report,
    log_stages,
    rank_stages,
)
from rgalign_ray.loop.ladder_rows import MOVED, ROWS, LadderRow, check, jobs_of, rows_of, rows_of_each, slice_name
from rgalign_ray.loop.stage import Outcome, Run, Stage, truth_inputs
from rgalign_ray.reasoner import models

if TYPE_CHECKING:
    from rgalign_ray.ranker.training import TrainedRanker

VERDICT = "verdict.parquet"
RANKER = "ranker"
SESSION_TEXTS = {"reasoner": "embeddings_0", "sentence": "embeddings_sentence", "need": "embeddings_need"}
FETCH_DEADLINE_S = 60.0
"""Longest wait for the manifest of a slice that is done."""


def run(config: Config) -> report.Report:
    """Runs what is not done yet of every seed and row, writes the comparison, and prints it.

    Raises:
        ConfigError: when the cluster cannot hold the plan, or a model is not there.
        DataError: when a log has a structural fault, or cannot judge.
        InfrastructureError: when no slice is done within `compare.slice_deadline_s`, or one's result is lost.
    """
    models.resolve(config.compare.encoder.model)
    config = controller.settle(config)
    rows = rows_of(config)
    jobs = runs(config, rows)
    prepare(jobs, rows)
    for what, waits in (("ladder", False), ("other readouts", True)):
        names = [name for name in rows if bool(ROWS[name].ranker_of) == waits]
        if names:
            numbers = range(config.compare.trainings)
            wanted = [(job, name) for job, own in rows_of_each(jobs, names) for name in own]
            run_slices(config, what, [slice_of(job, name, n) for n in numbers for job, name in wanted])
    made = alignments.with_alignments(jobs, rows, ladder_report.make(config, [row_result(jobs, name) for name in rows]))
    show(config, made)
    return made


def runs(config: Config, rows: list[RowName], seeds: Sequence[int] | None = None) -> list[Run]:
    """A run a seed, those of `compare` if no other are named; the first alone has exploratory rows. A real log is the
    same under every seed, hence read once: the first run lends what it prepares.
    """
    first, *others = (Run(of_seed(config, seed)) for seed in seeds or config.compare.judged_seeds)
    others = [exploring(job, []) for job in others]
    if truth_inputs(config):
        return [first, *others]
    lent = {stage.name: first.uri(stage.name) for stage in preparation(first.config, rows)}
    return [first, *(replace(job, elsewhere=lent, reading_seed=first.config.seed) for job in others)]


def exploring(job: Run, rows: list[RowName]) -> Run:
    """The run of a seed that has some exploratory rows."""
    compare = job.config.compare.model_copy(update={"exploratory": rows})
    return replace(job, config=job.config.model_copy(update={"compare": compare}))


def of_seed(config: Config, seed: int) -> Config:
    """The run of one seed: it sets the world's draw, initialisation and sampling together."""
    return config.model_copy(
        update={
            "seed": seed,
            "run_dir": storage.join(config.run_uri, f"seed_{seed}"),
            "world": config.world.model_copy(update={"seed": seed}),
        }
    )


def prepare(jobs: list[Run], rows: list[RowName]) -> None:
    """Runs, seed by seed, what rows share and what is not done yet."""
    for job, own in rows_of_each(jobs, rows):
        if not job.elsewhere:
            controller.console.print(f"[bold]seed {job.config.seed}[/bold]")
            controller.run_stages(job, preparation(job.config, own))
        wanted = alignments.read_by(own)
        if wanted:
            controller.console.print(f"[bold]seed {job.config.seed}, rewards[/bold]")
            controller.run_stages(_tuned(job, "qe_rec"), alignments.teaching(job.config))
        for name in wanted:
            controller.console.print(f"[bold]seed {job.config.seed}, alignment: {name}[/bold]")
            aligned = alignments.run_of(job, name)
            controller.run_stages(aligned, alignments.aligning(job, name))
    for job in jobs:
        controller.remember(job)  # as it was asked for, without what its judges are tuned to; a log's other seeds, too
    connection.connect(jobs[0].config)


def preparation(config: Config, rows: list[RowName]) -> list[Stage]:
    """What the rows of a seed share: the log, and its texts as each encoder reads them.

    Raises:
        ConfigError: for a row that reads the true need of a log that has none, or takes what is not there.
    """
    check(rows, config)
    reads = {ROWS[name].reads for name in rows}
    items, sessions = rank_stages.sentence_stages()
    sequence = [*log_stages.stages(config), items]
    if "sentence" in reads:
        sequence.append(sessions)
    if "need" in reads:
        if not truth_inputs(config):
            raise ConfigError("compare.rows: true_need is known of the simulated shop alone; leave it out.")
        inputs = ("sessions", "items_sentence", *truth_inputs(config))
        sequence.append(Stage("embeddings_need", "look up the true needs", embed_needs, (), inputs))
    if "reasoner" in reads:
        sequence += rank_stages.reading_stages(config, 0)
    if any("embeddings_more" in texts_of(ROWS[name]) for name in rows):
        sequence.append(rank_stages.more_stage())
    if alignments.read_by(rows) and not config.align:
        raise ConfigError("compare.rows: a row reads an aligned reasoner, but align names no objective.")
    for name in alignments.read_by(rows):
        alignments.settings_of(config, name)
    return sequence


def slice_of(job: Run, name: RowName, number: int = 0) -> tuple[Run, Stage]:
    """One ranker of a row under one seed, with the settings that its model was tuned to."""
    row = ROWS[name]
    stage = Stage(
        slice_name(name, number),
        f"judge {row.title}" if row.ranker_of or not row.retrained else f"train and judge {row.title}",
        partial(train_and_judge, row=row, number=number),
        ("ranker", *(["retrain.lr_scale", "retrain.margin"] if row.warm else []), "evaluate"),
        ("sessions", "features", *truth_inputs(job.config), *texts_of(row), *taught_by(row, number)),
    )
    return _tuned(place_of(job, name), row.kind), stage


def place_of(job: Run, name: RowName) -> Run:
    """The run that a row's slice belongs to: the seed's, or that of the alignment it reads."""
    aligned = ROWS[name].aligned
    return alignments.run_of(job, aligned) if aligned else job


def _tuned(job: Run, kind: Model) -> Run:
    """The run with the settings that a model was tuned to."""
    return with_ranker(job, job.config.compare.tuned.get(kind, {}))


def with_ranker(job: Run, changes: dict[str, Any]) -> Run:
    """The run with some of its ranker settings replaced."""
    return replace(job, config=job.config.model_copy(update={"ranker": job.config.ranker.changed(changes)}))


def texts_of(row: LadderRow) -> list[str]:
    """The artefacts that hold the intents' texts for a row and, where it reads them, the sessions'."""
    if row.aligned:
        return ["items", "embeddings_1"]
    if row.reads is None:
        return ["items_sentence"]
    by_reasoner = row.reads == "reasoner"
    more = ["embeddings_more"] if row.more and by_reasoner else []
    return ["items" if by_reasoner else "items_sentence", SESSION_TEXTS[row.reads], *more]


def taught_by(row: LadderRow, number: int) -> list[str]:
    """Where a row's ranker is taken from, if it is; and what a row that trains on an aligned reasoner is held against,
    to see where the alignment is lost.
    """
    if not row.retrained:
        return ["rankers_0", *(["embeddings_0"] if row.readout in MOVED else [])]
    if row.ranker_of:
        return [slice_name(row.ranker_of, number)]
    held_against = ["embeddings_0", "rewards_1"] if row.aligned else []
    return ["rankers_0", *held_against] if row.warm else held_against


def embed_needs(run: Run, out: str) -> Outcome:
    """Every session's true need, as the sentence encoder reads that intent's text."""
    from rgalign_ray.ranker.embeddings import Embeddings
    from rgalign_ray.rollout.worker import vectors_table
    from rgalign_ray.world.oracle import Oracle

    ids = storage.read_table(run.uri("sessions", "sessions"), ["session_id"])["session_id"].to_pylist()
    needs = Oracle.load(run.uri("log")).needs(ids)
    intents = sorted(set(needs))
    texts = Embeddings.load(run.uri("items_sentence"))
    vectors = dict(zip(intents, texts.items(intents), strict=True))
    table = vectors_table(
        ids,
        ["prompt"] * len(ids),
        [-1] * len(ids),
        [None] * len(ids),
        np.stack([vectors[need] for need in needs]),
        texts.reasoner_version,
    )
    storage.write_table(storage.join(out, "needs.parquet"), table)
    return Outcome({"sessions": len(ids)})


def train(run: Run, out: str, row: LadderRow, number: int = 0) -> TrainedRanker:
    """Trains a row's ranker in this process; of those of a row and a seed, the one of this number."""
    from rgalign_ray.ranker import training

    config = run.config
    items, *embeddings = texts_of(row)
    start = run.uri("rankers_0", "qe_rec") if row.warm else None
    job = training.RankerJob(
        rankers=(
            training.RankerSpec(
                RANKER,
                row.kind,
                storage.join(out, RANKER),
                rank_stages.ranker_seed(config, 1, number),
                row.shuffled,
                start_uri=start,
                margin=config.retrain.margin,
            ),
        ),
        log_uri=run.uri("sessions"),
        space=storage.read_json(run.uri("features", "features.json")),
        settings=rank_stages.warm_settings(config) if row.warm else config.ranker,
        storage_uri=run.records,
        run_name=RANKER,
        embeddings_uris=tuple(run.uri(name) for name in embeddings),
        item_embeddings_uri=run.uri(items),
        shuffle_seed=config.seed,
        local=True,
        train_roles=("rank", *(align_roles(1) if row.more else ())),
    )
    return training.train(job)[RANKER]


def train_and_judge(run: Run, out: str, row: LadderRow, number: int) -> Outcome:
    """Trains a row's ranker in this process, or takes another's, and judges it on the test sessions."""
    if not row.retrained:
        uri, figures = run.uri("rankers_0", "qe_rec"), run.manifest("rankers_0").figures["qe_rec"]
    elif row.ranker_of:
        taken = slice_name(row.ranker_of, number)
        uri, figures = run.uri(taken, RANKER), run.manifest(taken).figures
    else:
        trained = train(run, out, row, number)
        uri, figures = trained.uri, trained.figures
    test = TestSessions(run.uri("sessions"), run.truth, run.config.evaluate)
    _, *embeddings = texts_of(row)
    read, moved_from = (run.uri(embeddings[0]) if embeddings else None), None
    if row.readout in MOVED:
        frozen = run.uri("embeddings_0")
        read, moved_from = (read, frozen) if row.readout == "shift" else (frozen, read)
    rung = Rung(
        row.title,
        uri,
        read,
        query="shuffled" if row.shuffled or row.readout == "other" else "own",
        readout=row.readout if row.readout == "query" else None,
        any_version=not row.retrained,
        moved_from=moved_from,
    )
    judged = test.judge(test.score(rung))
    Verdict.of(test, judged).save(storage.join(out, VERDICT))
    figures = figures | {"calibration": test.calibration(test.score(rung, "log"))}
    if row.reads == "reasoner":
        figures["wrote"] = alignments.examples(run, test, run.uri(embeddings[0]))
    if alignments.has_diagnosis(row):
        found = evaluate_stages.diagnosis_of(run, 1, test, rung, judged, row.title)
        figures["diagnosis"] = found.model_dump()
    return Outcome({"test sessions": len(test.ids)}, figures)


def run_slices(config: Config, what: str, slices: list[tuple[Run, Stage]]) -> None:
    """Runs the slices that are not done as Ray tasks, as many at a time as the cluster holds."""
    import ray

    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if config.compare.cpus_per_slice > largest:
        raise ConfigError(
            f"compare.cpus_per_slice: {config.compare.cpus_per_slice:g}; the cluster's largest node has {largest:g}."
        )
    keyed = [(job, stage, controller.stage_key(job, stage)) for job, stage in slices]
    missing = [(job, stage, key) for job, stage, key in keyed if not controller.is_done(job, stage, key)]
    task = ray.remote(controller.execute).options(num_cpus=config.compare.cpus_per_slice, max_retries=3)
    waiting = {task.remote(job, stage, key): (job, stage) for job, stage, key in missing}
    with progress.track(what, len(slices), "slices", before=len(slices) - len(missing)) as advance:
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=config.compare.slice_deadline_s)
            if not done:
                job, stage = next(iter(waiting.values()))
                raise InfrastructureError(
                    f"{job.uri(stage.name)}: nothing was finished within {config.compare.slice_deadline_s:g} s "
                    "(compare.slice_deadline_s)."
                )
            job, stage = waiting.pop(done[0])
            try:
                seconds = ray.get(done[0], timeout=FETCH_DEADLINE_S).seconds
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # what the slice itself said, without Ray's account of it
            except ray.exceptions.RayError as error:
                raise InfrastructureError(f"{job.uri(stage.name)}: its result did not come back ({error}).") from None
            progress.note(f"seed {job.config.seed}, {stage.name.removeprefix('row_')}: {progress.clock(seconds)}")
            advance(1)


def row_result(jobs: list[Run], name: RowName) -> ladder_report.RowResult:
    """What a row's slices left behind, a job a seed that has it."""
    own = jobs_of(name, jobs)
    places = [place_of(job, name) for job in own]
    row = ROWS[name]
    read = [*texts_of(row), *(taught_by(row, 0) if not row.ranker_of else [])]
    if row.aligned:
        made = alignments.aligning(jobs[0], row.aligned)
        stages = (*judge_stages.stages(places[0].config, 1), *made)
        read += ["embeddings_0", "rankers_0", *(stage.name for stage in stages)]
    read = list(dict.fromkeys(read))
    numbers = range(jobs[0].config.compare.trainings)
    slices = [slice_name(name, number) for number in numbers]
    taken = row.ranker_of
    trained = [place.manifest(slice_name(taken, n)).seconds for place in places for n in numbers] if taken else [0.0]
    return ladder_report.RowResult(
        name,
        [job.config.seed for job in own],
        [Verdict.mean([Verdict.load(place.uri(each, VERDICT)) for each in slices]) for place in places],
        [place.manifest(each) for place in places for each in slices],
        float(np.mean([sum(place.manifest(stage).seconds for stage in read) for place in places]) + np.mean(trained)),
        exploratory=any(name in job.config.compare.exploratory for job in jobs),
    )


def show(config: Config, made: report.Report) -> None:
    """Writes comparison.html, .md, .csv and .json beside the seeds' runs, and prints the table."""
    place = storage.join(config.run_uri, "comparison")
    report_page.write(f"{place}.html", made)
    storage.write_bytes(f"{place}.md", report_text.markdown(made).encode())
    storage.write_bytes(f"{place}.csv", report_text.csv(made).encode())
    storage.write_json(f"{place}.json", made.model_dump(mode="json"))
    out = Console(width=max(Console().width, controller.TABLE_WIDTH))
    out.print(report_text.headline(made))
    out.print(report_text.comparisons(made))
    out.print("\n".join(made.summary))
    out.print(f"comparison: {place}.html, .md, .csv, .json")
