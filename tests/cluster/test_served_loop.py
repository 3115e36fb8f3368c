"""The loop closed over HTTP: simulated users ask, click and tell, and the next model learns from that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign_ray import storage

USERS = 80


@pytest.mark.slow
@pytest.mark.cluster
def test_a_model_learns_from_what_another_was_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--out", str(out), "--users", str(USERS), "--set", "ranker.epochs=2", "--set", "world.sessions=900"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.served_loop", *words],
        capture_output=True,
        text=True,
        timeout=1000,
        env=os.environ,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = storage.read_json(str(out / "served_loop.json"))["models"]
    assert first["collected"]["sessions"] == USERS and first["clicks"] >= first["collected"]["clicked"] > 0
    assert first["version"] != second["version"] and len(first["ctr"]) == len(second["ctr"]) == USERS
    learned = storage.read_manifest(str(out / "run-1/sessions"))
    assert learned is not None and learned.rows["sessions"] == USERS
    assert f"{USERS} served sessions" in done.stdout
