"""Settings by trial, before anything is compared: every model tries the same few in a world of its own.

  the tuning seed:  log → sessions → features → texts, as `compare` prepares them
  for each model and trial:  train the ranker, note its validation GAUC     (a slice, a Ray task)
  at the end:  a configuration for `compare` that holds each model's best trial

The tuning world is none of those that are judged, and its test sessions are not looked at.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import yaml
from rich.console import Console

from rgalign_ray import storage
from rgalign_ray.config import Config, RowName
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate import report, report_page, report_text
from rgalign_ray.loop import compare, controller
from rgalign_ray.loop.ladder_rows import ROWS, LadderRow, rows_of
from rgalign_ray.loop.stage import Outcome, Run, Stage
from rgalign_ray.ranker.models import MODELS
from rgalign_ray.reasoner import models


def run(config: Config) -> Config:
    """Runs the trials that are not done yet, and writes `tuned.yaml`, `tuning.html` and `tuning.md`.

    Returns:
        the configuration with each model's best trial in `compare.tuned`; the first of equal ones.

    Raises:
        ConfigError: when the cluster cannot hold the plan, a model is not there, or no row can be tuned.
        DataError: when the log has a structural fault.
        InfrastructureError: when no trial is done within `compare.slice_deadline_s`, or one's result is lost.
    """
    models.resolve(config.compare.encoder.model)
    asked = config
    config = controller.settle(config)
    job = Run(compare.of_seed(config, config.compare.tuning_seed))
    rows = tunable(rows_of(config))
    if not rows:
        raise ConfigError("compare.rows: none has settings to tune; name a model that is trained, as in [qe_rec, din].")
    trials = config.compare.trials
    compare.prepare([job], rows)
    slices = {(name, number): trial_of(job, name, number) for name in rows for number in range(len(trials))}
    compare.run_slices(config, "trials", list(slices.values()))
    found = {
        name: [job.manifest(slices[name, number][1].name).figures["best_gauc"] for number in range(len(trials))]
        for name in rows
    }
    best = {ROWS[name].kind: trials[gaucs.index(max(gaucs))] for name, gaucs in found.items()}
    tuned = asked.model_copy(update={"compare": asked.compare.model_copy(update={"tuned": best})})
    show(config, tuned, found)
    return tuned


def tunable(rows: list[RowName]) -> list[RowName]:
    """The rows that stand for their models: competitors that have something to train.

    Controls of a model, and rows in which it reads another reasoner or more sessions, use what the model itself was
    tuned to: one tuned better or worse would tell of its tuning.
    """
    return [name for name in rows if _stands_for_its_model(ROWS[name]) and MODELS[ROWS[name].kind].trained]


def _stands_for_its_model(row: LadderRow) -> bool:
    return not (row.control or row.aligned or row.more or row.ranker_of) and row.retrained


def trial_of(job: Run, name: RowName, number: int) -> tuple[Run, Stage]:
    """One row under one trial's settings."""
    row = ROWS[name]
    stage = Stage(
        f"trial_{name}_{number + 1}",
        f"train {row.title}, trial {number + 1}",
        partial(train, row=row),
        ("ranker",),
        ("sessions", "features", *compare.texts_of(row)),
    )
    return compare.with_ranker(job, job.config.compare.trials[number]), stage


def train(run: Run, out: str, row: LadderRow) -> Outcome:
    """The ranker's figures; of its weights only validation is asked."""
    return Outcome(figures=compare.train(run, out, row).figures)


def show(config: Config, tuned: Config, found: dict[RowName, list[float]]) -> None:
    """Writes the trials and the tuned configuration beside them, and prints the table."""
    trials = config.compare.trials
    made = report.Report(
        title=f"{config.name}: validation GAUC by trial",
        lead=f"Every model tried the same settings in the world of seed {config.compare.tuning_seed}.",
        facts={f"trial {number}": _words(changes) for number, changes in enumerate(trials, 1)},
        rows=[
            report.Row(
                name=ROWS[name].title,
                metrics={f"trial {n}": report.Estimate(value=gauc) for n, gauc in enumerate(gaucs, 1)},
                note=f"best: {_words(tuned.compare.tuned[ROWS[name].kind])}",
            )
            for name, gaucs in found.items()
        ],
        config=config.model_dump(mode="json"),
    )
    report_page.write(storage.join(config.run_uri, "tuning.html"), made)
    storage.write_bytes(storage.join(config.run_uri, "tuning.md"), report_text.markdown(made).encode())
    place = storage.join(config.run_uri, "tuned.yaml")
    storage.write_bytes(place, yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False).encode())
    out = Console(width=max(Console().width, controller.TABLE_WIDTH))
    out.print(report_text.headline(made))
    out.print(f"rgalign compare --config {place}")


def _words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "as configured"
