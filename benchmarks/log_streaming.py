"""From Parquet to training batches: rows per second beside a plain pyarrow scan, and memory as the log grows.

    python -m benchmarks.log_streaming --out runs/streaming

Makes a log of the simulated shop and ingests it, once, and measures each path in a process of its own:

    examples  what feeds the ranker's workers: Ray Data reads, prunes, regroups and encodes; batches are dropped
    scan      the same columns, filter and transformation over pyarrow's own scanner, in one thread
    fit       the pass that fits the feature space, streamed by Ray Data
    fit_scan  the same over pyarrow's scanner
    hold      as `examples`, but the batches are kept and joined, as a worker does that trains on them

Rates are taken between the first batch and the last, so that the start of Ray does not count; CPU seconds are those of
the driver and of every Ray process; workers start inside that time, so a log must be large for the rate to be steady.
Memory is the most that all of them held, shared pages counted once. Smaller logs are the first files of the largest,
hence as large as these files allow.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.logs.examples import column_names, columns
from rgalign_ray.logs.features import FeatureSpace, FeatureSpec
from rgalign_ray.logs.stream import BATCH_ROWS
from rgalign_ray.loop import environment, log_stages, meter
from rgalign_ray.loop.stage import Run

SIZES = (100_000, 300_000, 1_000_000)
ROLES = "roles={rank: 0.8, align: 0.01, valid: 0.1, audit: 0.08, test: 0.01, test_days: 0}"
READ = ("rank", "valid")
PATHS = ("examples", "scan", "fit", "fit_scan", "hold")
RAY_PATHS = ("examples", "fit", "hold")
"""Measured on the smaller logs too, for their memory."""
DAYS = 8
CPUS = 2
"""Of the Ray that is started; one task each."""
SAMPLE_EVERY_S = 1.0
"""Of the memory: the smallest log is over in seconds."""


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the log and the results.")],
    size: Annotated[list[int] | None, typer.Option(help="Sessions of a log; repeatable.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each path on the largest log.")] = 3,
    source: Annotated[
        Path | None, typer.Option(help="A log of jobs.make_shop to ingest the first files of, instead of making one.")
    ] = None,
) -> None:
    """Measure every path on logs of several sizes, and print rates, ratios and memory."""
    environment.prepare(config.load("demo"))  # inherited by the measuring processes, whose Ray reads it at import
    out = out.absolute()
    sizes = sorted(size or SIZES)
    log = _prepare(out, sizes[-1], source)
    plan = [(rows, path) for rows in sizes[:-1] for path in RAY_PATHS] + [(sizes[-1], path) for path in PATHS]
    plan += [(sizes[-1], path) for _ in range(repetitions - 1) for path in PATHS if path != "hold"]
    found: list[dict[str, Any]] = []
    with progress.track("streaming", len(plan), "measurements") as advance:
        for number, (rows, path) in enumerate(plan):
            result = out / "measured" / f"{number:02d}-{path}-{rows}.json"
            if not result.exists():
                part = _link(Path(log, "sessions"), Path(log, f"first-{rows}"), rows)
                command.apart([sys.executable, "-m", "benchmarks.log_streaming", "one", path, part, result], threads=1)
            found.append(json.loads(result.read_text()) | {"sessions": rows, "path": path})
            advance(1)
    summary = _summary(found, sizes)
    (out / "log_streaming.json").write_text(json.dumps({"summary": summary, "measured": found}, indent=2))
    _show(summary, sizes)
    print(out / "log_streaming.json")


def _prepare(out: Path, sessions: int, source: Path | None) -> str:
    """An ingested log of at least `sessions` sessions and its feature space."""
    place = out / f"log-{sessions}"
    (out / "measured").mkdir(parents=True, exist_ok=True)
    if not (place / "features.json").exists():
        world = f"world={{sessions: {sessions}, users: {max(sessions // 4, 1)}, days: {DAYS}}}"
        run = Run(config.load("demo", [world, ROLES]).model_copy(update={"run_dir": str(place)}))
        if source is None:
            log_stages.make_shop(run, run.uri("log"))
        elif not (place / "log").exists():
            _link(source.absolute(), place / "log", sessions)
        progress.note("ingesting")
        log_stages.ingest_sessions(run, run.uri("sessions"))
        storage.delete(run.uri("log"))
        spec = FeatureSpec.load("shop")
        some = _link(place / "sessions", place / f"first-{SIZES[0]}", SIZES[0])
        space = FeatureSpace.fit(spec, _scan(some, spec.columns, ("rank",)))
        storage.write_json(run.uri("features.json"), space.to_dict())
    return str(place)


def _link(source: Path, part: Path, rows: int) -> str:
    """A log that is links to the first files of the log `source` which hold at least `rows` sessions."""
    if part.exists():
        return str(part)
    held = 0
    for file in sorted((source / "sessions").rglob("*.parquet")):
        if held >= rows:
            break
        held += pq.read_metadata(file).num_rows
        target = part / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
    for name in ("intents.parquet", "candidate_sets.parquet"):
        os.link(source / name, part / name)
    return str(part)


def one(path: str, log: str, result: str) -> None:
    """One path over one log, in this process."""
    space = storage.read_json(storage.join(os.path.dirname(log), "features.json"))
    meter.SAMPLE_EVERY_S = SAMPLE_EVERY_S
    before = meter.memory_mb()
    with meter.PeakMemory() as memory:
        measured = _fit(path, log) if path.startswith("fit") else _examples(path, log, space)
    sessions = sum(pq.read_metadata(file).num_rows for file in Path(log, "sessions").rglob("*.parquet"))
    figures = measured | {"log_sessions": sessions, "peak_mb": memory.peak_mb, "before_mb": before}
    Path(result).write_text(json.dumps(figures))


class Watch:
    """Rows, wall and CPU seconds from the first batch to the last; the first batch's own rows do not count."""

    def __init__(self) -> None:
        self.rows = 0
        self.first: tuple[float, float] | None = None
        self.last = (0.0, 0.0)

    def passes(self, tables: Any) -> Iterator[pa.Table]:
        """The tables as they are."""
        for table in tables:
            if not table.num_rows:
                continue
            if self.first is None:
                self.first = time.perf_counter(), _cpu_seconds()
            else:
                self.rows += table.num_rows
            yield table
        self.last = time.perf_counter(), _cpu_seconds()

    def figures(self) -> dict[str, float]:
        assert self.first is not None
        wall, cpu = self.last[0] - self.first[0], self.last[1] - self.first[1]
        return {"rows": self.rows, "rows_per_s": self.rows / wall, "rows_per_cpu_s": self.rows / cpu}


def _cpu_seconds() -> float:
    """CPU seconds of this process and all its descendants, Ray's daemons included."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it ended meanwhile
            continue
        total += times.user + times.system
    return total


def _examples(path: str, log: str, space: dict[str, Any]) -> dict[str, Any]:
    from rgalign_ray.ranker import training
    from rgalign_ray.ranker.ragged import Ragged
    from rgalign_ray.ranker.rows import from_tables, training_table
    from rgalign_ray.ranker.sizes import Sizes

    spec = training.RankerSpec("din", "din", "", 0)
    job = training.RankerJob((spec,), log, space, config.Ranker(), storage_uri="", run_name="")
    catalogue = training._catalogue(log)
    watch = Watch()
    if path == "scan":
        encode = training._reading(job, catalogue, None)
        names = [*columns(FeatureSpace.from_dict(space), column_names(log)), "role"]
        for _ in watch.passes(training_table(table, **encode) for table in _scan(log, names, READ)):
            pass
        return watch.figures()
    _connect()
    blocks = training._dataset(job, catalogue, None).iter_batches(batch_size=None, batch_format="pyarrow")
    if path == "examples":
        for _ in watch.passes(blocks):
            pass
        return watch.figures()
    features = FeatureSpace.from_dict(space)
    sizes = Sizes.of(features, num_intents=catalogue[0].num_rows, embedding_dim=0, item_dim=0)
    rows = from_tables(training.held(watch.passes(blocks)), sizes)
    arrays = (part for it in rows.values() for part in ((it.values, it.counts) if isinstance(it, Ragged) else (it,)))
    held = sum(array.nbytes for array in arrays)
    return watch.figures() | {"held_bytes_per_session": held / len(rows["fields"])}


def _fit(path: str, log: str) -> dict[str, Any]:
    from rgalign_ray.logs import stream

    spec = FeatureSpec.load("shop")
    watch = Watch()
    if path == "fit_scan":
        tables: Any = _scan(log, spec.columns, ("rank",))
    else:
        _connect()
        tables = stream.batches(stream.sessions(log, columns=spec.columns, roles=["rank"]))
    FeatureSpace.fit(spec, watch.passes(tables))
    return watch.figures()


def _connect() -> None:
    from rgalign_ray.loop import connection

    connection.connect(config.load("demo", [f"cluster.num_cpus={CPUS}"]))


def _scan(log: str, names: list[str], roles: tuple[str, ...]) -> Iterator[pa.Table]:
    """Tables of about `BATCH_ROWS` rows by pyarrow alone, in one thread."""
    fs, path = storage.filesystem(storage.join(log, "sessions"))
    partitions = ds.partitioning(pa.schema([("dt", pa.string()), ("region", pa.string())]), flavor="hive")
    dataset = ds.dataset(path, filesystem=fs, format="parquet", partitioning=partitions)
    held: list[pa.RecordBatch] = []
    for batch in dataset.to_batches(
        columns=names, filter=pc.field("role").isin(roles), batch_size=BATCH_ROWS, use_threads=False
    ):
        held.append(batch)
        if sum(part.num_rows for part in held) >= BATCH_ROWS:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _summary(found: list[dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """Medians, with the least and the greatest; ratios are of medians on the largest log."""
    largest = sizes[-1]

    def values(path: str, rows: int, name: str) -> list[float]:
        return [one[name] for one in found if one["path"] == path and one["sessions"] == rows]

    def spread(path: str, rows: int, name: str) -> list[float]:
        taken = values(path, rows, name)
        return [statistics.median(taken), min(taken), max(taken)]

    summary: dict[str, Any] = {
        path: {
            name: {rows: spread(path, rows, name) for rows in sizes if values(path, rows, name)}
            for name in ("rows_per_s", "rows_per_cpu_s", "peak_mb")
        }
        for path in PATHS
    }
    for path, plain in (("examples", "scan"), ("fit", "fit_scan")):
        for name in ("rows_per_s", "rows_per_cpu_s"):
            summary[path][f"{name}_ratio"] = summary[path][name][largest][0] / summary[plain][name][largest][0]
    summary["log_sessions"] = {one["sessions"]: one["log_sessions"] for one in found}
    summary["hold"]["bytes_per_session"] = values("hold", largest, "held_bytes_per_session")[0]
    return summary


def _show(summary: dict[str, Any], sizes: list[int]) -> None:
    held = [summary["log_sessions"][rows] for rows in sizes]
    table = Table(title=f"{held[-1]:,} sessions; Ray with {CPUS} CPUs")
    for name in ("path", "rows/s", "rows/s of CPU", *(f"MiB at {rows:,}" for rows in held), "largest / smallest"):
        table.add_column(name, justify="left" if name == "path" else "right")
    for path in PATHS:
        rates = ["{:,.0f}\n{:,.0f} … {:,.0f}".format(*summary[path][name][sizes[-1]]) for name in _RATES]
        peaks = [summary[path]["peak_mb"].get(rows, [math.nan])[0] for rows in sizes]
        cells = [f"{value:,.0f}" if value == value else "" for value in peaks]
        grown = peaks[-1] / peaks[0]
        table.add_row(path, *rates, *cells, f"{grown:.2f}" if grown == grown else "")
    Console().print(table)
    for path, plain in (("examples", "scan"), ("fit", "fit_scan")):
        by_wall, by_cpu = (summary[path][f"{name}_ratio"] for name in _RATES)
        print(f"{path} / {plain}: {by_wall:.2f} by wall time, {by_cpu:.2f} per second of CPU")
    print(f"hold: {summary['hold']['bytes_per_session']:,.0f} bytes a session")


_RATES = ("rows_per_s", "rows_per_cpu_s")


if __name__ == "__main__":
    command.run(measure, one)
