"""The closed loop, killed at every stage boundary, ends with the figures of an uninterrupted run, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from quiet_run import SETTINGS, QuietRun

from rgalign_ray import storage
from rgalign_ray.config import load
from rgalign_ray.loop.stages import stages

pytestmark = pytest.mark.slow

KILLED_AT_THE_SECOND_STAGE = """
import os, signal, sys
from rgalign_ray.loop import environment
from rgalign_ray.config import Config
environment.prepare(Config())
from rgalign_ray import storage
from rgalign_ray.loop import controller

execute, started = controller.execute, []

def dies(job, stage, key):
    started.append(stage.name)
    if len(started) < 2:
        return execute(job, stage, key)
    with storage.writing(job.uri(stage.name), resume_key=key if stage.units else None) as work:
        storage.write_bytes(storage.join(work, "half.bin"), b"half a stage")
        os.kill(os.getpid(), signal.SIGKILL)

controller.execute = dies
from rgalign_ray.cli import main
main()
"""


def loop(folder: Path, *, killed: bool) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", KILLED_AT_THE_SECOND_STAGE] if killed else [sys.executable, "-m", "rgalign_ray.cli"]
    return subprocess.run(
        [*start, "loop", *SETTINGS, "--run-dir", str(folder)], capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.fault
def test_killed_at_every_boundary_equals_uninterrupted(quiet_run: QuietRun, tmp_path: Path) -> None:
    quiet = quiet_run.folder
    names = [stage.name for stage in stages(load("smoke"))]
    for number in range(1, len(names)):
        died = loop(tmp_path / "killed", killed=True)
        assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
        assert died.stderr.count("done already") == number - 1
        whole = [name for name in names if storage.read_manifest(str(tmp_path / "killed" / name))]
        assert whole == names[:number]
    last = loop(tmp_path / "killed", killed=False)
    assert last.returncode == 0, last.stderr[-3000:]
    for name in names:
        ours, theirs = (storage.read_manifest(str(run / name)) for run in (tmp_path / "killed", quiet))
        assert ours is not None and theirs is not None
        assert (ours.key, ours.rows, ours.figures) == (theirs.key, theirs.rows, theirs.figures), name
    evaluation = "evaluation/evaluation.json"
    assert (tmp_path / "killed" / evaluation).read_bytes() == (quiet / evaluation).read_bytes()
    report = (quiet / "report.html").read_text()
    assert "RGAlign-Rec" in report
    assert "a difference without it may be chance" in quiet_run.stdout
    hidden = [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert not [left for path in hidden for left in path.iterdir()], "nothing is left of the tries that were killed"
    shown = json.loads((quiet / evaluation).read_text())
    assert {row["name"] for row in shown["rows"]} >= {"two-tower", "QE-Rec", "RGAlign-Rec", "base rate"}
    again = loop(quiet, killed=False)
    assert again.returncode == 0
    assert again.stderr.count("done already") == len(names)
    assert os.path.getmtime(quiet / evaluation) < os.path.getmtime(quiet / "report.html")
