"""What benchmarks share as commands: a user's error in one line, and measurements in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from rgalign_ray.errors import UserError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS", "POLARS_MAX_THREADS")
DEADLINE_S = 3600.0


def run(measure: Callable[..., None], one: Callable[..., None] | None = None) -> None:
    """Runs a benchmark, or, asked for `one …`, a single measurement of it with the words that follow."""
    if one is not None and sys.argv[1:2] == ["one"]:
        one(*sys.argv[2:])
        return
    try:
        typer.run(measure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def apart(command: Sequence[object], threads: int | None = None, cwd: Path | None = None) -> str:
    """What a command prints, run in a process of its own; `threads` is how many its libraries may take.

    Raises:
        UserError: when it fails, with the end of what it said.
    """
    words = [str(word) for word in command]
    bound = dict.fromkeys(THREADS, str(threads)) if threads else {}
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **bound}, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if done.returncode:
        raise UserError(f"'{' '.join(words)}' failed:\n{done.stderr[-3000:]}")
    return done.stdout
