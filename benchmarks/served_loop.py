"""The loop closed over HTTP: simulated users ask the service, click, and the next model learns from their feedback.

    python -m benchmarks.served_loop --config smoke --out runs/served-loop

  run 0 (a log) ─▶ service ◀─▶ users of round 1 ─▶ feedback ─▶ log ─▶ run 1 ─▶ service ◀─▶ users of round 2 ─▶ …

Users come from a shop of another seed. They are shown three intents drawn by Plackett–Luce and click by its truth; the
table says what every model's three best are worth to the users of all rounds, without noise.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate import statistics
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.loop import environment
from rgalign_ray.loop.stage import Run
from rgalign_ray.ops.local_cluster import free_port
from rgalign_ray.serve.session_reader import SessionReader
from rgalign_ray.world.oracle import Oracle

SHOWN = 3
LEARNS = {"rank": 0.6, "align": 0.1, "valid": 0.2, "test": 0.1, "test_days": 0}
"""Roles of a round's users: they come within days, and models are compared on others."""
EVERYTHING = 100
"""Intents that are asked for: all of the shop's."""
TIMEOUT_S = 120.0


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.loads(answer.read())


def best_of(intents: Sequence[dict[str, Any]], index: dict[str, int]) -> list[int]:
    """The intents with the highest scores, whatever was drawn."""
    return [index[it["intent_id"]] for it in sorted(intents, key=lambda it: -float(it["score"]))[:SHOWN]]


def visit(
    address: str,
    reader: SessionReader,
    rows: list[dict[str, Any]],
    tell: Callable[[dict[str, Any], list[dict[str, Any]]], Any],
    at_once: int,
) -> list[Any]:
    """Users ask, each its own session; `tell` gets the session and what was answered, and its returns are gathered."""
    with progress.track("visits", len(rows), "users") as advance, ThreadPoolExecutor(at_once) as pool:

        def one(row: dict[str, Any]) -> Any:
            its = {"path": "live", "k": EVERYTHING, "request_id": row["session_id"]}
            body = {"session": reader.session(row).model_dump(mode="json")} | its
            told = tell(row, call(f"{address}/v1/rank", body)["intents"])
            advance(1)
            return told

        return list(pool.map(one, rows))


def shop(settings: Config, out: Path) -> tuple[list[dict[str, Any]], Oracle, dict[str, int]]:
    """Sessions in the order of their time, truth, and places of the intents, of a shop of another seed."""
    from rgalign_ray.loop import log_stages

    others = config.changed(settings, {"world.seed": settings.world.seed + 1})
    log_stages.stages(others)[0].run(Run(others), str(out))
    order = [("ts", "ascending"), ("session_id", "ascending")]
    rows = storage.read_table(str(out / "sessions")).sort_by(order).to_pylist()
    return rows, Oracle.load(str(out)), Catalogue.load(str(out)).index


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the results; must not be there.")],
    config_name: Annotated[str, typer.Option("--config", help="Of the runs.")] = "smoke",
    users: Annotated[
        int, typer.Option(help="Sessions of a round, and of those that the models are compared on.")
    ] = 600,
    rounds: Annotated[int, typer.Option(help="Models that learn from feedback.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of the Plackett–Luce slates.")] = 1.0,
    at_once: Annotated[
        int, typer.Option(help="Users who ask at a time; with one, equal seeds give equal results.")
    ] = 1,
    override: Annotated[list[str] | None, typer.Option("--set", help="Settings of the runs.")] = None,
) -> None:
    """Serve, learn from feedback, and serve again."""
    settings = config.load(config_name, override or [])
    environment.prepare(settings)  # Ray reads it as it is imported
    from ray import serve

    from rgalign_ray.loop import controller
    from rgalign_ray.serve import app, pair
    from rgalign_ray.serve.collect import collect

    out = out.absolute()
    if out.exists():
        raise ConfigError(f"--out: {out} is there already; name a folder that is not.")
    visitors, oracle, index = shop(settings, out / "visitors")
    if len(visitors) < users * (rounds + 2):
        raise ConfigError(
            f"--users: {rounds + 2} times {users:,} are asked for; the shop has {len(visitors):,} sessions."
        )
    judges = visitors[-users:]
    ids = [row["session_id"] for row in judges]

    def tell(row: dict[str, Any], intents: list[dict[str, Any]]) -> int:
        names = [intent["intent_id"] for intent in intents[:SHOWN]]
        drawn = oracle.draw([row["session_id"]], np.array([[index[name] for name in names]]), settings.seed)
        clicks, resolved = ([name for name, yes in zip(names, its[0], strict=True) if yes] for its in drawn)
        told = {"request_id": row["session_id"], "seen": SHOWN, "clicks": clicks, "resolved": resolved}
        call(f"{address}/v1/feedback", told)
        return len(clicks)

    run = config.changed(settings, {"run_dir": str(out / "run-0"), "name": "run-0"})
    models: list[dict[str, Any]] = []
    port = free_port()
    for round_ in range(rounds + 1):
        controller.run(run, until="rankers_0")
        folder, log = str(out / f"feedback-{round_}"), str(out / f"log-{round_ + 1}")
        its = {"round": 0, "port": port, "feedback": folder, "explore_temperature": temperature}
        online = config.changed(run, {f"serve.{key}": value for key, value in its.items()})
        spec = pair.find(online.run_uri, 0)
        app.run(online, blocking=False)
        address = f"http://127.0.0.1:{online.serve.port}"
        (model,) = call(f"{address}/v1/models")["variants"]
        best = np.array(visit(address, spec.reader(), judges, lambda _, intents: best_of(intents, index), at_once))
        found = {"version": model["version"], "ctr": oracle.expected(ids, best)[0].tolist()}
        if round_ < rounds:
            clicks = visit(address, spec.reader(), visitors[users * round_ : users * (round_ + 1)], tell, at_once)
            found["clicks"] = int(np.sum(clicks))
        serve.delete(app.NAME)
        models.append(found)
        if round_ < rounds:
            found["collected"] = collect(folder, [spec], log)
            source = {"source": "parquet", "uri": f"{log}/sessions", "intents": f"{log}/intents.parquet"}
            changes: dict[str, Any] = {f"log.{key}": value for key, value in source.items()}
            changes |= {f"roles.{key}": value for key, value in LEARNS.items()}
            run = config.changed(
                run, changes | {"run_dir": str(out / f"run-{round_ + 1}"), "name": f"run-{round_ + 1}"}
            )
    storage.write_json(str(out / "served_loop.json"), {"users": users, "temperature": temperature, "models": models})
    show(models, [row["user_id"] for row in judges])


def show(models: list[dict[str, Any]], user_ids: list[str]) -> None:
    table = Table(title=f"true CTR@3 of each model's best, {len(user_ids):,} sessions of users whom none has met")
    for column in ("model", "learned from", "true CTR@3 [95 %]", "over the first [95 %]"):
        table.add_column(column)
    for number, model in enumerate(models):
        its = statistics.bootstrap(np.array(model["ctr"]), user_ids)
        gain = statistics.paired_bootstrap(np.array(model["ctr"]), np.array(models[0]["ctr"]), user_ids)
        source = f"{models[number - 1]['collected']['sessions']:,} served sessions" if number else "the first log"
        spans = [f"{it.mean:.3f} [{it.users[0]:.3f}, {it.users[1]:.3f}]" for it in (its, gain)]
        table.add_row(f"{number}", source, spans[0], spans[1] if number else "")
    Console().print(table)


if __name__ == "__main__":
    command.run(measure)
