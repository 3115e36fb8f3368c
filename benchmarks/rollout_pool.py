"""The rollout pool with engines that only wait: how busy its workers are, how soon a killed one is back, what it holds.

    python -m benchmarks.rollout_pool --out runs/pool

    busy      share of the time between a worker's first unit and its last that it spends sampling, at each size of
              the pool: what is missing went into handing out, reading and writing units, and into waiting for a CPU
              while others start; beside it, the same from the moment on when all have started
    recovery  from the death of a worker to the first unit of the one in its place, beside what a worker takes to start
              where nothing has died
    memory    most that the driver held over a log, and over one ten times as long

Engines sleep, so that more workers than CPUs can be measured on one machine; Ray is told of as many CPUs as there are
workers.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress
from rgalign_ray.loop import environment
from rgalign_ray.reasoner.engine import Group, Prompts, Sample
from rgalign_ray.rollout.worker import Instruction, Unit

SIZES = (1, 4, 16, 64)
UNITS_PER_WORKER = 8
UNIT_SESSIONS = 16
CPUS_PER_WORKER = 0.01
BUSY = ("busy", "busy_when_all_have_started")
LOG_UNITS = 200
"""Work units of the shorter log."""


@dataclass(frozen=True)
class WaitingEngine:
    """Both the spec and the engine: sleeps `seconds` a unit, and notes when it did in `notes`."""

    notes: str
    seconds: float

    version = "waiting"
    hidden_size = 576

    def start(self) -> WaitingEngine:
        self.note("start")
        return self

    def note(self, what: str) -> None:
        Path(self.notes, f"{os.getpid()}.{time.time_ns()}.{what}").touch()

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        self.note("begin")
        time.sleep(self.seconds)
        vector = np.ones(self.hidden_size, np.float16)
        groups = [
            Group(
                [1] * 100, vector, [Sample("where is it", [5, 6, 2], [-1.0] * 3, "stop", seed, vector) for seed in row]
            )
            for row in seeds
        ]
        self.note("end")
        return groups


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    size: Annotated[list[int] | None, typer.Option(help="Workers of a pool; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="What an engine takes for a unit.")] = 4.0,
) -> None:
    """Measure all three, each in a process and a Ray of its own."""
    environment.prepare(config.load("demo"))  # inherited by the measuring processes, whose Ray reads it at import
    sizes = size or SIZES
    plan = [("busy", workers, workers * UNITS_PER_WORKER, seconds) for workers in sizes]
    plan += [("recovery", 2, 16, seconds), *(("memory", 4, units, 0.0) for units in (LOG_UNITS, 10 * LOG_UNITS))]
    found = []
    with progress.track("pool", len(plan), "measurements") as advance:
        for what, workers, units, pause in plan:
            found.append({"what": what, "workers": workers, "units": units} | _run(out, what, workers, units, pause))
            advance(1)
    (out / "rollout_pool.json").write_text(json.dumps({"seconds": seconds, "measured": found}, indent=2))
    _show(found)
    print(out / "rollout_pool.json")


def _run(out: Path, what: str, workers: int, units: int, seconds: float) -> dict[str, Any]:
    folder = out.absolute() / f"{what}-{workers}-{units}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notes").mkdir(parents=True)
    task = (what, workers, units, seconds, folder)
    command.apart([sys.executable, "-m", "benchmarks.rollout_pool", "one", *task])
    return json.loads((folder / "figures.json").read_text())


def one(what: str, *words: str) -> None:
    """One measurement, in this process."""
    workers, units, seconds, folder = int(words[0]), int(words[1]), float(words[2]), Path(words[3])
    import ray

    from rgalign_ray.rollout.pool import RolloutPool

    settings = config.Rollout(workers=workers, n=8, cpus_per_worker=CPUS_PER_WORKER)
    ray.init(
        address="local", num_cpus=max(workers, 2), include_dashboard=False, object_store_memory=200 * 2**20,
        logging_level="error",
    )  # fmt: skip
    pool = RolloutPool(
        settings,
        {
            "engine": WaitingEngine(str(folder / "notes"), seconds),
            "instruction": Instruction("", "", "v1"),
            "settings": settings,
            "run_seed": 1,
            "round_": 1,
            "out_uri": str(folder),
        },
    )
    killed, began = None, time.time()
    for done, _ in enumerate(pool.run(source(units), "benchmark"), 1):
        if what == "recovery" and done == units // 2:
            pid = notes(folder)[-1][0]
            os.kill(pid, signal.SIGKILL)
            killed = time.time()
    pool.close()
    seen = notes(folder)
    figures: dict[str, Any] = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if what == "busy":
        full = max(at for _, at, what in seen if what == "start")
        figures |= dict(zip(BUSY, (busy(seen), busy([note for note in seen if note[1] > full])), strict=True))
    if killed is not None:
        figures |= {"deaths": pool.deaths, **recovery(seen, began, killed)}
    (folder / "figures.json").write_text(json.dumps(figures))
    ray.shutdown()


def source(units: int) -> Iterator[Unit]:
    for number in range(units):
        ids = [f"s{number:06d}-{row}" for row in range(UNIT_SESSIONS)]
        yield Unit(ids, [f"order shipped, delayed, {session}" for session in ids])


Note = tuple[int, float, str]
"""Process, moment in seconds, and what began or ended."""


def notes(folder: Path) -> list[Note]:
    """What the engines noted, in order of time."""
    split = [path.name.split(".") for path in (folder / "notes").iterdir()]
    return sorted([(int(pid), int(at) / 1e9, what) for pid, at, what in split], key=lambda note: note[1])


def busy(seen: Sequence[Note]) -> list[float]:
    """Of each worker that had at least two units, the share of its time from its first unit to its last.

    A unit that had begun before the first note is left out.
    """
    shares = []
    for worker in sorted({pid for pid, _, _ in seen}):
        begins, ends = ([at for pid, at, what in seen if (pid, what) == (worker, name)] for name in ("begin", "end"))
        ends = [at for at in ends if begins and at > begins[0]]
        if len(ends) > 1:
            shares.append(sum(end - begin for begin, end in zip(begins, ends, strict=True)) / (ends[-1] - begins[0]))
    return shares


def recovery(seen: Sequence[Note], began: float, killed: float) -> dict[str, float]:
    """Seconds from the pool's start to its first unit, and from the death to the first unit of the next worker."""
    fresh = {pid for pid, at, what in seen if what == "start" and at > killed}
    back = min(at for pid, at, what in seen if pid in fresh and what == "begin")
    return {"start_s": min(at for _, at, what in seen if what == "begin") - began, "back_after_s": back - killed}


def _show(found: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Workers whose engines only wait")
    table.add_column("workers", justify="right")
    table.add_column("busy, mean (least)", justify="right")
    table.add_column("when all have started", justify="right")
    for row in found:
        if row["what"] == "busy":
            shares = [f"{statistics.mean(row[name]):.1%} ({min(row[name]):.1%})" for name in BUSY]
            table.add_row(str(row["workers"]), *shares)
    Console().print(table)
    [back] = [row for row in found if row["what"] == "recovery"]
    print(
        f"recovery: {back['back_after_s']:.1f} s from a worker's death to the first unit of the next; the pool's first "
        f"took {back['start_s']:.1f} s"
    )
    short, long = (row for row in found if row["what"] == "memory")
    print(
        f"driver: {short['peak_mb']:.0f} MiB over {short['units']:,} units, {long['peak_mb']:.0f} MiB over "
        f"{long['units']:,}: {long['peak_mb'] / short['peak_mb']:.2f} times"
    )


if __name__ == "__main__":
    command.run(measure, one)
