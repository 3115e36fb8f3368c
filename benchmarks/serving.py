"""What the service takes for an answer, by path, and what its hops cost beside the same models in one process.

    python -m benchmarks.serving --run-dir runs/demo --out runs/serving      # needs `hey` (Debian: apt-get install hey)

Client, gateway and models share this machine's cores, so that requests per second say little by themselves: what counts
are the ratios, taken in one run. Saturation is what as many clients as `--clients` get who ask again at once. Latencies
are of requests that come at random times (a Poisson process), answered or not, at 70 % of that. The overload is 120 %
of it likewise, of a service with its usual budget; for the others it is without end, so that nobody is refused.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import aiohttp
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import environment
from rgalign_ray.ops.local_cluster import free_port

PATHS = ("store", "null", "live")
CALM = 0.7
START_S = 180.0
PATIENT_MS = 60_000.0
"""A budget that no answer exceeds."""
OVER = 1.2
MS = 1000.0


@dataclass
class Load:
    """What clients met."""

    per_s: float
    p50_ms: float
    p99_ms: float
    statuses: dict[str, int]

    @classmethod
    def of(cls, seconds: float, answers: Sequence[tuple[str, float]]) -> Load:
        """Of statuses and the seconds that each took."""
        p50, p99 = np.quantile([took for status, took in answers if status == "200"] or [np.nan], [0.5, 0.99]) * MS
        statuses = Counter(status for status, _ in answers)
        return cls(statuses["200"] / seconds, float(p50), float(p99), dict(statuses))


def hey(url: str, body: Path, seconds: float, clients: int) -> Load:
    """Asks for `seconds`, each client again as it is answered."""
    words = ["hey", "-z", f"{seconds:g}s", "-c", str(clients), "-t", "60", "-o", "csv", "-m", "POST"]
    words += ["-T", "application/json", "-D", str(body), f"{url}/v1/rank"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = csv.DictReader(io.StringIO(done.stdout))
    return Load.of(seconds, [(row["status-code"], float(row["response-time"])) for row in rows])


def arrivals(url: str, body: Path, seconds: float, per_s: float) -> Load:
    """Asks at random times, `per_s` times a second on average, whether or not what was asked before is answered."""
    said = body.read_bytes()

    async def all_of_them() -> list[tuple[str, float]]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=60),
            headers={"Content-Type": "application/json"},
        ) as session:

            async def ask() -> tuple[str, float]:
                started = time.perf_counter()
                try:
                    async with session.post(f"{url}/v1/rank", data=said) as answer:
                        await answer.read()
                        return str(answer.status), time.perf_counter() - started
                except (aiohttp.ClientError, TimeoutError) as error:
                    return type(error).__name__, time.perf_counter() - started

            asked, next_at = [], time.perf_counter()
            random, end = np.random.default_rng(0), next_at + seconds
            while next_at < end:
                await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
                asked.append(asyncio.create_task(ask()))
                next_at += random.exponential(1 / per_s)
            return await asyncio.gather(*asked)

    return Load.of(seconds, asyncio.run(all_of_them()))


def until_ready(url: str) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


@contextmanager
def served(settings: Config) -> Iterator[str]:
    """The service on Ray Serve."""
    from ray import serve

    from rgalign_ray.serve import app

    app.run(settings, blocking=False)
    url = f"http://127.0.0.1:{settings.serve.port}"
    until_ready(url)
    yield url
    serve.delete(app.NAME)


@contextmanager
def plain(settings: Config) -> Iterator[str]:
    """The same models, gateway and batches in one process, without Ray."""
    port = free_port()
    it = settings.serve
    words = [settings.run_uri, it.round or 0, port, it.batch, it.batch_wait_ms, it.store or ""]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.serving", "one", *map(str, words)])
    try:
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait()


class Batches:
    """Gathers calls and answers them at once, in a thread, as `serve.batch` does, which wants a replica around it."""

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]], size: int, wait_s: float) -> None:
        self.answer, self.size, self.wait_s = answer, size, wait_s
        self.waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self.worker: asyncio.Task[None] | None = None

    async def __call__(self, asked: Any) -> Any:
        self.worker = self.worker or asyncio.create_task(self.work())
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((asked, answered))
        return await answered

    async def work(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            end = time.monotonic() + self.wait_s
            while len(batch) < self.size:
                try:
                    batch.append(await asyncio.wait_for(self.waiting.get(), max(0.0, end - time.monotonic())))
                except TimeoutError:
                    break
            answers = await asyncio.to_thread(self.answer, [asked for asked, _ in batch])
            for (_, answered), its in zip(batch, answers, strict=True):
                answered.set_result(its)


def one(run_uri: str, round_: str, port: str, batch: str, wait_ms: str, store: str) -> None:
    """Runs the plain process."""
    import uvicorn

    from rgalign_ray.logs.catalogue import Catalogue
    from rgalign_ray.serve import api, pair, web
    from rgalign_ray.serve.access import Access
    from rgalign_ray.serve.gateway import Gateway
    from rgalign_ray.serve.query_store import QueryStore
    from rgalign_ray.serve.variants import Variant, Variants

    spec = pair.find(run_uri, int(round_))
    ranker, reasoner = pair.FrozenRanker(spec), pair.FrozenReasoner(spec)
    sizes = int(batch), float(wait_ms) / MS
    scores = Batches(lambda asked: ranker.score(*map(list, zip(*asked, strict=True))), *sizes)
    vectors = Batches(reasoner.read, *sizes)

    async def score(*asked: Any) -> Any:
        return await scores(asked)

    async def read(text: str, seed: int | None) -> Any:
        return await vectors(text), None

    async def ready() -> bool:
        return True

    reader, catalogue = spec.reader(), Catalogue.load(spec.sessions_uri)
    version = api.ServedVersion(
        name="default",
        share=1.0,
        version=spec.version,
        reasoner="",
        ranker=spec.meta.version,
        round=spec.round_,
        intents=catalogue.size,
        features=reader.features,
        read=[],
    )
    kept = QueryStore(store, spec.reads, spec.dim, 1e9) if store else None
    variant = Variant("default", 1.0, version, reader, catalogue, read, score, score, kept)
    gateway = Gateway(config.Serve(budget_ms=PATIENT_MS), Variants([variant]))
    app = web.build(gateway, ready, Access({}, None), lambda: None)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")


def check_path(url: str, body: Path, path: str) -> None:
    """Whether the service answers by the path that is asked for, and not by one that it falls back to."""
    asked = urllib.request.Request(f"{url}/v1/rank", body.read_bytes(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        taken = json.load(answer)["path"]
    assert taken == path, f"{url} answers by {taken}, not by {path}"


def bare(settings: Config, row: dict[str, Any], times: int = 30) -> dict[str, float]:
    """Milliseconds of one session in this process: the ranker's scores, and e(x)."""
    from rgalign_ray.serve import pair

    spec = pair.find(settings.run_uri, settings.serve.round)
    ranker, reasoner = pair.FrozenRanker(spec), pair.FrozenReasoner(spec)
    its = spec.reader().row(spec.reader().session(row))
    everything = np.arange(len(spec.meta.intent_ids), dtype=np.int32)
    (text,) = spec.reader().texts([its])
    calls = {
        "ranker": lambda: ranker.score([its], [everything], [None]),
        "reasoner": lambda: reasoner.read([text]),
    }
    found = {}
    for name, call in calls.items():
        call()
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            call()
            taken.append((time.perf_counter() - started) * MS)
        found[name] = median(taken)
    return found


def memory_mb() -> float:
    """Of the service's processes."""
    its = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    names = ("ray::ServeReplica", "ray::ProxyActor")
    return sum(p.memory_info().rss for p in its if p.info["cmdline"][0].startswith(names)) / 2**20


def measure(
    run_dir: Annotated[str, typer.Option(help="Of a run that is whole.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 15.0,
    overload_s: Annotated[float, typer.Option(help="Of the overload; 0 leaves it out.")] = 60.0,
    clients: Annotated[int, typer.Option(help="Clients that ask at a time.")] = 32,
) -> None:
    """Measure the service."""
    if shutil.which("hey") is None:
        raise ConfigError("hey: not on the PATH; Debian has it as `apt-get install hey`.")
    environment.prepare(config.load("demo"))  # Ray reads it as it is imported
    from rgalign_ray.serve import pair, query_store

    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    changes = {"run_dir": os.path.abspath(run_dir), "serve.variants": [], "serve.store": str(out / "store")}
    settings = config.changed(config.load("demo"), changes | {"serve.round": 0, "serve.store_max_age_h": 1e6})
    settings = config.changed(settings, {"serve.port": free_port()})
    spec = pair.find(settings.run_uri, 0)
    (row,) = pair.example_sessions(spec, 1)
    vector = np.zeros(spec.dim, np.float16)
    kept = query_store.Kept(row["user_id"], datetime.now(UTC).replace(tzinfo=None), vector)
    query_store.write(str(out / "store"), spec.reads, [kept])
    session, bodies = spec.reader().session(row), {}
    for path in PATHS:
        bodies[path] = out / f"{path}.json"
        bodies[path].write_text(json.dumps({"session": session.model_dump(mode="json"), "path": path}))

    found: dict[str, Any] = {"bare_ms": bare(settings, row)}
    progress.note("bare models: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found["bare_ms"].items()))
    patient = config.changed(settings, {"serve.budget_ms": PATIENT_MS})
    singly = config.changed(patient, {"serve.batch": 1, "serve.batch_wait_ms": 0.0})
    for name, start, its in (("service", served, patient), ("plain", plain, patient), ("one by one", served, singly)):
        with start(its) as url:
            for path in PATHS:
                check_path(url, bodies[path], path)
                hey(url, bodies[path], 3, clients)
                full = hey(url, bodies[path], seconds, clients)
                found[f"{name}, {path}"] = {"saturated": full.__dict__}
                told = f"{name}, {path}: {full.per_s:.1f}/s"
                if name == "service":
                    paced = arrivals(url, bodies[path], seconds, CALM * full.per_s)
                    found[f"{name}, {path}"]["at 70 %"] = paced.__dict__
                    told += f"; at 70 %: p50 {paced.p50_ms:.1f} ms, p99 {paced.p99_ms:.1f} ms"
                progress.note(told)
    if overload_s:
        with served(settings) as url:
            hey(url, bodies["store"], 3, clients)
            before = memory_mb()
            rate = OVER * found["service, store"]["saturated"]["per_s"]
            over = arrivals(url, bodies["store"], overload_s, rate)
            found["overload"] = {**over.__dict__, "memory_mb": [before, memory_mb()]}
    storage.write_json(str(out / "serving.json"), found)
    show(found)


def show(found: dict[str, Any]) -> None:
    table = Table(title="the service, by path")
    for column in ("path", "requests/s", "of the plain process", "over one by one", "p50 at 70 %", "p99 at 70 %"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for path in PATHS:
        its, rate = found[f"service, {path}"], found[f"service, {path}"]["saturated"]["per_s"]
        over = [rate / found[f"{name}, {path}"]["saturated"]["per_s"] for name in ("plain", "one by one")]
        paced = its["at 70 %"]
        cells = [
            f"{rate:.1f}",
            f"{over[0]:.2f}",
            f"{over[1]:.2f}",
            f"{paced['p50_ms']:.1f} ms",
            f"{paced['p99_ms']:.1f} ms",
        ]
        table.add_row(path, *cells)
    Console().print(table)
    if "overload" in found:
        it = found["overload"]
        first, last = it["memory_mb"]
        told = f"{it['per_s']:.1f} answers/s, p50 {it['p50_ms']:.0f} ms, p99 {it['p99_ms']:.0f} ms"
        print(f"at 120 %: {told}; by status {it['statuses']}; memory {first:.0f} to {last:.0f} MB")


if __name__ == "__main__":
    command.run(measure, one)
