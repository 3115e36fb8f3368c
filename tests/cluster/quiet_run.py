"""A run of the whole loop that nothing disturbs, made once, for others to be held against."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SETTINGS = ["--config", "smoke", "--set", "world.sessions=900", "--set", "ranker.epochs=2"]


@dataclass(frozen=True)
class QuietRun:
    """The fixture `quiet_run`."""

    folder: Path
    stdout: str


def call(*command: str | Path, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a command without this process's Python paths; fails with all of its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done
