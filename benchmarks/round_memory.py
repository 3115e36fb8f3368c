"""What the driver holds while it tells of a round's rewards and chooses among its queries, over rounds of two lengths.

    python -m benchmarks.round_memory --out runs/round_memory

A round is written with rewards drawn at random, in parts of 1,024 sessions and units of 256; then, in a process of its
own, the stages `rewards_1`, which finds all units judged, and `selected_1` read it. The peak is of that process, with
what it has imported.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, schema, storage
from rgalign_ray.logs.catalogue import INTENTS_FILE
from rgalign_ray.loop import align_stages, judge_stages, round_sessions
from rgalign_ray.loop.stage import Run

PARTS = (10, 100)
UNIT_SESSIONS = 256
N = 8
INTENTS = 60
PROMPT_TOKENS = 64
WORDS = "order waits in To Receive, 7 days; where is my parcel"


def measure(out: Annotated[Path, typer.Option(help="Folder of the results.")]) -> None:
    """Write a round and one ten times as long, and measure what reading each takes."""
    found = []
    with progress.track("rounds", 2 * len(PARTS), "steps") as advance:
        for parts in PARTS:
            folder = out.absolute() / f"{parts}-parts"
            shutil.rmtree(folder, ignore_errors=True)
            for step in ("write", "read"):
                told = command.apart([sys.executable, "-m", "benchmarks.round_memory", "one", step, folder, parts])
                advance(1)
            found.append({"sessions": parts * round_sessions.PART_SESSIONS} | json.loads(told.splitlines()[-1]))
            shutil.rmtree(folder)
    (out / "round_memory.json").write_text(json.dumps({"n": N, "measured": found}, indent=2))
    _show(found)
    print(out / "round_memory.json")


def one(step: str, *words: str) -> None:
    """One step, in this process."""
    run, parts = Run(config.load("smoke", [f"run_dir={words[0]}"])), int(words[1])
    if step == "write":
        write(run, parts)
        return
    judged = judge_stages.judge(run, run.uri("rewards_1"), 1)
    chosen = align_stages.choose(run, run.uri("selected_1"), 1)
    assert judged.rows["rollouts"] == N * chosen.rows["sessions"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": peak, "selected": chosen.rows["selected"]}))


def write(run: Run, parts: int) -> None:
    """The artefacts that the two stages read."""
    names = [f"intent {number:02d}" for number in range(INTENTS)]
    knowledge = [{"intent_id": name, "title": name, "description": name, "category": "c"} for name in names]
    storage.write_table(run.uri("sessions", INTENTS_FILE), pa.Table.from_pylist(knowledge, schema=schema.INTENTS))
    size = round_sessions.PART_SESSIONS
    for number in range(parts):
        part, draw = f"{number:06d}", np.random.default_rng(number)
        ids = [f"s{number * size + row:08d}" for row in range(size)]
        sessions = pa.table(
            {
                "session_id": ids,
                "user_id": ids,
                "candidates": [names] * size,
                "clicks": (np.arange(INTENTS) == draw.integers(INTENTS, size=(size, 1))).tolist(),
            }
        )
        storage.write_table(run.uri("rollouts_1", round_sessions.FOLDER, f"{part}.parquet"), sessions)
        for start in range(0, size, UNIT_SESSIONS):
            _write_unit(run, f"{part}-{start:04d}", ids[start : start + UNIT_SESSIONS], draw)


def _write_unit(run: Run, name: str, ids: list[str], draw: np.random.Generator) -> None:
    rows = [{"session_id": session, "sample": sample} for session in ids for sample in range(N)]
    shared = {
        "source": "policy",
        "query": WORDS,
        "prompt_ids": list(range(PROMPT_TOKENS)),
        "completion_ids": list(range(16)),
        "logprobs": [-1.0] * 16,
    }
    rollouts = pa.Table.from_pylist([row | shared for row in rows], schema=schema.ROLLOUTS)
    storage.write_table(run.uri("rollouts_1", "rollouts", f"{name}.parquet"), rollouts)
    drawn = draw.normal(size=(len(rows), 2))
    said = [
        {"reward": first, "uplift": first + 0.1, "second": second, "valid": True} for first, second in drawn.tolist()
    ]
    scored = pa.Table.from_pylist([row | each for row, each in zip(rows, said, strict=True)], schema=schema.SCORED)
    storage.write_table(run.uri("rewards_1", judge_stages.SCORED, f"{name}.parquet"), scored)


def _show(found: list[dict[str, Any]]) -> None:
    table = Table(title=f"The driver over a round, {N} queries a session")
    table.add_column("sessions", justify="right")
    table.add_column("peak, MiB", justify="right")
    for row in found:
        table.add_row(f"{row['sessions']:,}", f"{row['peak_mb']:.0f}")
    Console().print(table)
    first, last = found[0]["peak_mb"], found[-1]["peak_mb"]
    print(f"{last / first:.2f} times over a round {PARTS[-1] / PARTS[0]:g} times as long")


if __name__ == "__main__":
    command.run(measure, one)
