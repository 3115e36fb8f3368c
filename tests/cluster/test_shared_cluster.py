"""Two runs submitted to one cluster of labelled nodes, of which one joins and one dies while they are at work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from rgalign_ray import storage
from rgalign_ray.ops.local_cluster import free_port

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

DEADLINE_S = 600.0
JOINING_S = 30.0
ROLLOUT, REWARD, LEARNER = ({"rgalign": name} for name in ("rollout", "reward", "learner"))
BOUND = {"rollout": ROLLOUT, "reward": REWARD, "ranker": LEARNER, "learner": LEARNER}
SETTINGS = {
    **{f"{section}.node_labels": f"{{rgalign: {labels['rgalign']}}}" for section, labels in BOUND.items()},
    "world.sessions": "3000",
    "roles.rank": "0.15",
    "roles.align": "0.35",
    "ranker.epochs": "1",
    "rollout.min_workers": "1",
    "rollout.workers": "4",
    "rollout.unit_sessions": "2",
    "sft.batch_sessions": "64",
    "contrastive.batch_sessions": "64",
}


def of(cpus: int, labels: dict[str, str]) -> dict[str, Any]:
    """A node with what it shares with no other: the port for jobs, and the folder that their code is unpacked in."""
    own = {"dashboard_agent_listen_port": free_port(), "temp_dir": tempfile.mkdtemp(prefix="ray-node-")}
    return {"num_cpus": cpus, "labels": labels, "include_dashboard": True, **own}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, str]]:
    """Three nodes, one for each kind of work, and where jobs are submitted."""
    # a job's python is the first that its node finds
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    port = free_port()
    made = Cluster(initialize_head=True, head_node_args=of(4, REWARD) | {"dashboard_port": port})
    made.add_node(**of(2, LEARNER))
    made.add_node(**of(1, ROLLOUT))
    made.wait_for_nodes()
    yield made, f"http://127.0.0.1:{port}"
    made.shutdown()


def until(there: Callable[[], bool], within_s: float, what: str) -> None:
    started = time.monotonic()
    while not there():
        assert time.monotonic() - started < within_s, what
        time.sleep(0.2)


def files(artefact: Path) -> dict[str, bytes]:
    """Their content but for the manifest, which tells how long it took."""
    found = {path for path in artefact.rglob("*") if path.is_file() and path.name != storage.MANIFEST}
    assert found
    return {str(path.relative_to(artefact)): path.read_bytes() for path in found}


def test_nodes_come_and_go_under_two_runs(cluster: tuple[Cluster, str], tmp_path: Path) -> None:
    nodes, address = cluster

    def rgalign(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rgalign_ray.cli", verb, *arguments, "--address", address],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )

    def state(run: str) -> str:
        shown = rgalign("status", run)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    def sampling_on(node: str) -> bool:
        assert "failed" not in state("first") + state("second"), rgalign("logs", "first").stdout[-3000:]
        return bool(
            list_actors(
                address=address,
                filters=[("class_name", "=", "RolloutWorker"), ("state", "=", "ALIVE"), ("node_id", "=", node)],
            )
        )

    for run in ("first", "second"):
        sets = SETTINGS | {"name": run, "run_dir": str(tmp_path / run)}
        overrides = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
        submitted = rgalign("submit", "loop", "--config", "smoke", *overrides, "--no-wait")
        assert submitted.returncode == 0, submitted.stderr
    old = nodes.list_all_nodes()[-1]
    until(lambda: sampling_on(old.node_id), DEADLINE_S, "the node that is there is used")
    new = nodes.add_node(**of(1, ROLLOUT))
    until(lambda: sampling_on(new.node_id), JOINING_S, "a node that joins is used")
    nodes.remove_node(old, allow_graceful=False)

    for run in ("first", "second"):
        until(lambda run=run: "running" not in state(run), DEADLINE_S, run)
        assert "succeeded" in state(run), rgalign("logs", run).stdout[-3000:]
    one, other = tmp_path / "first", tmp_path / "second"
    for artefact in ("rollouts_1", "rewards_1", "align_1_contrastive", "rankers_1", "evaluation"):
        assert files(one / artefact) == files(other / artefact), artefact
    told = [storage.read_manifest(str(run / "rollouts_1")) for run in (one, other)]
    rows = [manifest.rows for manifest in told if manifest]
    assert rows[0] == rows[1] and rows[0]["rollouts"] == 2 * rows[0]["sessions"] > 400
    assert "sessions set aside" not in rows[0]
    assert sum(manifest.figures["worker_deaths"] for manifest in told if manifest) > 0
