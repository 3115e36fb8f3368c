"""Two runs on one cluster of labelled nodes, of which one comes and one goes: both end as an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from quiet_run import SETTINGS

from rgalign_ray import storage
from rgalign_ray.ops import local_cluster

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

LONGER = [*SETTINGS, "--set", "rollout.n=8", "--set", "rollout.unit_sessions=1"]
"""So that there is something to take over when a node joins."""
PLACED = [
    *("--set", "encode.node_labels={rgalign: rollout}", "--set", "rollout.node_labels={rgalign: rollout}"),
    *("--set", "ranker.node_labels={rgalign: learner}", "--set", "learner.node_labels={rgalign: learner}"),
    *("--set", "rollout.workers=4", "--set", "rollout.min_workers=1"),
]
RUNS = ("one", "two")
ROLLOUT_WORKER = "ray::RolloutWorker"
DEADLINE_S = 1500.0
USED_WITHIN_S = 30.0
EVALUATION = "evaluation/evaluation.json"


def rgalign(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "rgalign_ray.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def until(there: Callable[[], object], within_s: float = DEADLINE_S) -> float:
    """How long it took."""
    started = time.monotonic()
    while not there():
        assert time.monotonic() - started < within_s, rgalign("status")
        time.sleep(0.2)
    return time.monotonic() - started


def add(label: str) -> psutil.Process:
    """One more node."""
    rgalign("cluster", "add", "--cpus", "2", "--label", f"rgalign={label}")
    cluster = local_cluster.running()
    assert cluster is not None
    return psutil.Process(cluster.nodes[-1].pid)


def workers(node: psutil.Process) -> list[psutil.Process]:
    """The rollout workers of a node."""
    found = []
    for process in node.children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(ROLLOUT_WORKER):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A head, with a token of its own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    rgalign("cluster", "up", "--cpus", "3")
    yield
    rgalign("cluster", "down")


def test_two_runs_share_nodes_that_come_and_go(cluster: None, tmp_path: Path) -> None:
    quiet = [sys.executable, "-m", "rgalign_ray.cli", "loop", *LONGER, "--run-dir", str(tmp_path / "quiet")]
    subprocess.run(quiet, check=True, capture_output=True, env={**os.environ, "RAY_ADDRESS": ""})
    expected = (tmp_path / "quiet" / EVALUATION).read_bytes()

    add("learner")
    leaving = add("rollout")
    for name in RUNS:
        own = ["--run-dir", str(tmp_path / name), "--set", f"name={name}", "--no-wait"]
        rgalign("submit", "loop", *LONGER, *PLACED, *own)
    until(lambda: workers(leaving))
    joining = add("rollout")
    assert until(lambda: workers(joining)) < USED_WITHIN_S
    for process in [*leaving.children(recursive=True), leaving]:
        process.kill()
    for name in RUNS:
        until(lambda at=tmp_path / name: storage.read_manifest(str(at / "evaluation")))
        assert (tmp_path / name / EVALUATION).read_bytes() == expected
        until(lambda its=name: "succeeded" in rgalign("status", its), within_s=60.0)
