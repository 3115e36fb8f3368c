"""A log of the simulated shop of any size, as a Ray job or on its own: it needs one core, and memory that does not
grow with the log.

    python -m jobs.make_shop --out URI --set world.sessions=7530000 --set world.users=2000000

Settings are those of `world`, `roles` and `rounds` (`rgalign config` prints them): roles decide which wordings a
session's texts have. The folder holds intents, candidate_sets, sessions and truth, as `rgalign prepare shop` writes
them; read its sessions with `log.source=parquet`.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, UserError
from rgalign_ray.loop import log_stages
from rgalign_ray.loop.meter import PeakMemory
from rgalign_ray.loop.stage import Run


def make(
    out: Annotated[str, typer.Option(help="Folder or URI to write the log's tables into.")],
    name: Annotated[str, typer.Option("--config", "-c", help="A packaged configuration, or a .yaml file.")] = "demo",
    override: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE")] = None,
) -> None:
    """Simulate the shop and write its log; says how fast, and with how much memory."""
    settings = config.load(name, [*(override or []), "log.source=shop"])
    if storage.list_files(storage.join(out, "sessions"), ".parquet"):
        raise ConfigError(f"--out: {out} holds a log already; name another folder, or remove it.")
    started, cpu = time.monotonic(), time.process_time()
    with PeakMemory() as memory:
        rows = log_stages.make_shop(Run(settings), out).rows
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    sessions = rows["sessions"]
    print(f"{out}: {', '.join(f'{count:,} {table}' for table, count in rows.items())}")
    print(f"{sessions / seconds:,.0f} sessions/s, {sessions / cpu:,.0f} per second of CPU; {memory.peak_mb:,.0f} MiB")


if __name__ == "__main__":
    try:
        typer.run(make)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
