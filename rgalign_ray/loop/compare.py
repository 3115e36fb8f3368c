"""The ladder: rankers side by side on the same sessions, over several seeds.

  for each seed:  log → sessions → features → texts read by a sentence encoder and by the frozen reasoner
  for each seed and row:  train the ranker, judge it on that seed's test sessions     (a slice, a Ray task)
  at the end:  one table, as text, CSV, Markdown and a page

A slice is a stage like any other: done once for its settings and inputs, and skipped when it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console

from rgalign_ray import config as configuration
from rgalign_ray import progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.evaluate import comparison, report
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.evaluate.ladder import Rung, TestSessions
from rgalign_ray.evaluate.statistics import Estimate
from rgalign_ray.loop import controller, log_stages, rank_stages, summary
from rgalign_ray.loop.stage import TRAIN_RECORDS, Outcome, Run, Stage, truth_inputs
from rgalign_ray.reasoner import models

VERDICT = "verdict.parquet"
RANKER = "ranker"
FETCH_DEADLINE_S = 60.0
"""Longest wait for the manifest of a slice that is done."""


@dataclass(frozen=True)
class LadderRow:
    """One way to rank.

    Args:
        title: in the table.
        kind: the ranker.
        note: what the reader must know of it.
        reads: whose embeddings of the sessions it reads, if any; its intents' texts come from the same.
        shuffled: trained and tested on embeddings of other users' sessions.
        control: stands there to unmask a gain, not to win.
    """

    title: str
    kind: Literal["qe_rec", "din_sentence"] | configuration.Baseline
    note: str = ""
    reads: Literal["reasoner", "sentence"] | None = None
    shuffled: bool = False
    control: bool = False

    @property
    def rival(self) -> bool:
        """A row without an LLM that QE-Rec must beat."""
        return self.reads != "reasoner" and not self.control


ROWS: dict[str, LadderRow] = {
    "popularity": LadderRow("popularity", "popularity", "each intent's share of clicks", control=True),
    "lr": LadderRow("LR", "lr"),
    "deepfm": LadderRow("DeepFM", "deepfm"),
    "dcn_v2": LadderRow("DCN-v2", "dcn_v2"),
    "two_tower": LadderRow("AutoInt+MoE two-tower", "two_tower", "intents by id and text"),
    "din": LadderRow("DIN", "din"),
    "sasrec": LadderRow("SASRec encoder", "sasrec"),
    "bst": LadderRow("BST", "bst"),
    "din_text": LadderRow("DIN + intent text", "din_text"),
    "din_sentence": LadderRow("DIN + session text", "din_sentence", "read by a sentence encoder", "sentence"),
    "template": LadderRow(
        "QE-Rec, template query",
        "qe_rec",
        "the session's text by a sentence encoder instead of an LLM",
        "sentence",
        control=True,
    ),
    "qe_rec": LadderRow("QE-Rec", "qe_rec", "frozen reasoner", "reasoner"),
    "qe_rec_shuffled": LadderRow(
        "QE-Rec shuffled",
        "qe_rec",
        "trained and tested with queries shuffled across users",
        "reasoner",
        shuffled=True,
        control=True,
    ),
}


def run(config: Config) -> report.Report:
    """Runs what is not done yet of every seed and row, writes the comparison, and prints it.

    Raises:
        ConfigError: when the cluster cannot hold the plan, or a model is not there.
        DataError: when a log has a structural fault, or cannot judge.
        InfrastructureError: when no slice is done within `compare.slice_deadline_s`, or one's result is lost.
    """
    models.resolve(config.compare.encoder.model)
    config = controller.settle(config)
    jobs = [Run(of_seed(config, seed)) for seed in range(config.compare.seeds)]
    for job in jobs:
        controller.console.print(f"[bold]seed {job.config.seed}[/bold]")
        controller.run_stages(job, preparation(job.config))
    controller.connect(config)
    run_slices(config, [(job, slice_stage(job.config, name)) for job in jobs for name in config.compare.rows])
    made = comparison_report(config, jobs)
    show(config, made)
    return made


def of_seed(config: Config, seed: int) -> Config:
    """The run of one seed: it sets the world's draw, initialisation and sampling together."""
    return config.model_copy(
        update={
            "seed": seed,
            "run_dir": storage.join(config.run_uri, f"seed_{seed}"),
            "world": config.world.model_copy(update={"seed": seed}),
        }
    )


def preparation(config: Config) -> list[Stage]:
    """What all rows of a seed share: the log, and its texts as each encoder reads them."""
    reads = {ROWS[name].reads for name in config.compare.rows}
    sequence = [*log_stages.stages(config), *rank_stages.sentence_stages(config)]
    if "reasoner" in reads:
        sequence += rank_stages.reading_stages(config, 0)
    return sequence


def slice_stage(config: Config, name: str) -> Stage:
    """One row under one seed."""
    inputs = ["sessions", "features", *truth_inputs(config), *_texts(ROWS[name])]
    return Stage(
        f"row_{name}",
        f"train and judge {ROWS[name].title}",
        partial(train_and_judge, row=ROWS[name]),
        ("ranker", "evaluate"),
        tuple(inputs),
    )


def _texts(row: LadderRow) -> tuple[str, str]:
    """The artefacts that hold the intents' texts and the sessions' texts for a row."""
    return ("items", "embeddings_0") if row.reads == "reasoner" else ("items_sentence", "embeddings_sentence")


def train_and_judge(run: Run, out: str, row: LadderRow) -> Outcome:
    """Trains a row's ranker in this process, and judges it on the test sessions."""
    from rgalign_ray.ranker import training

    config = run.config
    items, embeddings = _texts(row)
    job = training.RankerJob(
        rankers=(training.RankerSpec(RANKER, row.kind, storage.join(out, RANKER), config.seed * 1000, row.shuffled),),
        log_uri=run.uri("sessions"),
        space=storage.read_json(run.uri("features", "features.json")),
        settings=config.ranker,
        storage_uri=run.uri(TRAIN_RECORDS),
        run_name=RANKER,
        embeddings_uri=run.uri(embeddings) if row.reads else None,
        item_embeddings_uri=run.uri(items),
        shuffle_seed=config.seed,
        local=True,
    )
    trained = training.train(job)[RANKER]
    test = TestSessions(run.uri("sessions"), run.truth, config.evaluate)
    rung = Rung(row.title, trained.uri, job.embeddings_uri, query="shuffled" if row.shuffled else "own")
    judged = test.judge(test.score(rung))
    Verdict.of(test, judged).save(storage.join(out, VERDICT))
    return Outcome({"test sessions": len(test.ids)}, trained.figures)


def run_slices(config: Config, slices: list[tuple[Run, Stage]]) -> None:
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
    with progress.track("ladder", len(slices), "slices") as advance:
        advance(len(slices) - len(missing))
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


def comparison_report(config: Config, jobs: list[Run]) -> report.Report:
    """The ladder's table and its claims, from the slices' verdicts."""
    settings = config.evaluate
    names: list[str] = list(config.compare.rows)
    verdicts = {name: [Verdict.load(job.uri(f"row_{name}", VERDICT)) for job in jobs] for name in names}
    manifests = {name: [job.manifest(f"row_{name}") for job in jobs] for name in names}
    first, *others = verdicts[names[0]]
    metrics = [metric for metric in first.values if all(metric in verdict.values for verdict in others)]
    rows = [
        report.Row(
            name=ROWS[name].title,
            metrics={metric: _over_users(comparison.estimate(verdicts[name], metric, settings)) for metric in metrics},
            note=ROWS[name].note,
            control=ROWS[name].control,
        )
        for name in names
    ]
    comparisons = []
    for better, worse in claims(names, {name: _validation(manifests[name]) for name in names}):
        for metric in metrics:
            found = comparison.difference(verdicts[better], verdicts[worse], metric, settings)
            comparisons.append(
                report.Comparison(
                    better=ROWS[better].title,
                    worse=ROWS[worse].title,
                    metric=metric,
                    difference=_claimed(found),
                    separated=found.separated,
                )
            )
    seeds = len(jobs)
    claimed = "the wider of those over users and over seeds" if seeds > 1 else "over users; one seed"
    return report.Report(
        title=f"{config.name}: rankers on {config.log.source}, {seeds} seeds",
        lead="Rankers side by side on the same test sessions, equally trained.",
        summary=[
            summary.sentence(found, "separated over users" + (" and seeds" if seeds > 1 else " (one seed)"))
            for found in comparisons
            if found.metric == metrics[0]
        ],
        facts={
            "log": config.log.source,
            "seeds": str(seeds),
            "test sessions a seed": f"{len(verdicts[names[0]][0].sessions):,}",
            "reasoner": config.reasoner.model,
            "encoder": config.compare.encoder.model,
            "intervals": f"{settings.confidence:.0%}; of rows over users, of differences {claimed}",
        },
        metrics={name: text for name, text in summary.meanings(config).items() if name in metrics},
        rows=[*(row for row in rows if not row.control), *(row for row in rows if row.control)],
        comparisons=comparisons,
        stages=[
            report.Stage(
                name=f"{ROWS[name].title}, all seeds",
                seconds=sum(m.seconds for m in manifests[name]),
                peak_mb=max(m.peak_memory_mb for m in manifests[name]),
            )
            for name in names
        ],
        config=config.model_dump(mode="json"),
    )


def claims(names: list[str], validation: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs to compare, the one expected to be better first.

    The best rival is the row without an LLM of the best validation GAUC: chosen by the test sessions, it
    would be the luckiest.
    """
    rivals = [name for name in names if ROWS[name].rival]
    best = max(rivals, key=lambda name: validation[name]) if rivals else ""
    pairs = [("qe_rec", best), (best, "popularity"), ("qe_rec", "template"), ("qe_rec", "qe_rec_shuffled")]
    return [(better, worse) for better, worse in pairs if better in names and worse in names and better != worse]


def _validation(manifests: list[storage.Manifest]) -> float:
    return sum(manifest.figures["best_gauc"] for manifest in manifests) / len(manifests)


def _over_users(found: Estimate) -> report.Estimate:
    """A row's figure. Over seeds it varies with how hard each world is, which says nothing of the row."""
    return report.Estimate(value=found.mean, low=found.users[0], high=found.users[1])


def _claimed(found: Estimate) -> report.Estimate:
    """A difference with the wider of both intervals: it excludes zero where both do."""
    low, high = found.users
    if found.over_seeds is not None:
        low, high = min(low, found.over_seeds[0]), max(high, found.over_seeds[1])
    return report.Estimate(value=found.mean, low=low, high=high)


def show(config: Config, made: report.Report) -> None:
    """Writes comparison.html, .md, .csv and .json beside the seeds' runs, and prints the table."""
    place = storage.join(config.run_uri, "comparison")
    report.write_report(f"{place}.html", made)
    storage.write_bytes(f"{place}.md", report.markdown(made).encode())
    storage.write_bytes(f"{place}.csv", report.csv(made).encode())
    storage.write_json(f"{place}.json", made.model_dump(mode="json"))
    out = Console(width=max(Console().width, controller.TABLE_WIDTH))
    out.print(report.headline(made))
    out.print(report.comparisons(made))
    out.print("\n".join(made.summary))
    out.print(f"comparison: {place}.html, .md, .csv, .json")
