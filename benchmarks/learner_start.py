"""What it costs to start learners for each objective anew, beside learners that stay.

    python -m benchmarks.learner_start --out runs/learner_start

    fit       one optimiser step of RG-SFT by Ray Train on two workers, from the call to the artefact
    first     the same step in a process that has just started, one worker, with its imports
    resident  the same step in a process that has made one before: what a learner that stays would take

The tiny model learns from a handful of sessions, so that what is measured is the start.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from benchmarks import command
from rgalign_ray import config, schema, storage
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import environment

SESSIONS = 8


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    repetitions: Annotated[int, typer.Option(help="Of each.")] = 3,
) -> None:
    """Measure all three, each in a process of its own."""
    environment.prepare(config.load("smoke"))  # Ray reads it as it is imported
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for way in ("fit", "resident"):
        command.apart([sys.executable, "-m", "benchmarks.learner_start", "one", way, out.absolute(), repetitions])
        found[way] = json.loads((out / f"{way}.json").read_text())
    first, *resident = found["resident"]
    found = {"fit": found["fit"], "first": [first], "resident": resident}
    (out / "learner_start.json").write_text(json.dumps(found, indent=2))
    for way, seconds in found.items():
        print(f"{way}: {statistics.median(seconds):.1f} s ({min(seconds):.1f} … {max(seconds):.1f})")
    print(out / "learner_start.json")


def one(way: str, folder: str, times: str) -> None:
    """Seconds of one way, in this process."""
    out, repetitions = Path(folder), int(times)
    began = time.perf_counter()
    run = _fit(out) if way == "fit" else _here()
    seconds = []
    for number in range(repetitions + (way == "resident")):
        task = _task(out / f"{way}-{number}", workers=2 if way == "fit" else 1)
        if number or way == "fit":
            began = time.perf_counter()
        run(task)
        seconds.append(time.perf_counter() - began)
    (out / f"{way}.json").write_text(json.dumps(seconds))


def _fit(out: Path) -> Callable[[LearnerTask], object]:
    from rgalign_ray.learner import training
    from rgalign_ray.loop.connection import connect

    connect(config.Config(cluster=config.Cluster(num_cpus=2, object_store_mb=256)))
    return lambda task: training.fit(task, 1, str(out / "train"), Path(task.out).parent.name)


def _here() -> Callable[[LearnerTask], object]:
    from rgalign_ray.learner import sft, training

    training.group_of_one()
    return lambda task: sft.train(task, Host())


def _task(folder: Path, workers: int) -> LearnerTask:
    row = {"prompt_ids": [40] * 20, "completion_ids": [50, 51, 2], "query": "q", "weight": 1.0, "rank": 0}
    rows = [{"session_id": f"s{number}", **row} for number in range(SESSIONS)]
    selected = pa.Table.from_pylist(rows, schema=schema.SELECTED)
    storage.write_table(str(folder / "data/selected/0.parquet"), selected)
    return LearnerTask(
        objective="sft",
        reasoner=config.Reasoner(model="tiny", dtype="float32"),
        learner=config.Learner(workers=workers, micro_batch=SESSIONS // workers, bf16=False),
        optimisation=config.Sft(epochs=1, batch_sessions=SESSIONS),
        weights=None,
        data=str(folder / "data"),
        pair=None,
        prompt=config.Prompt(),
        template=Template.load("shop"),
        rollout=config.Rollout(),
        out=str(folder / "out"),
        version="tiny+1.sft",
        seed=0,
    )


if __name__ == "__main__":
    command.run(measure, one)
