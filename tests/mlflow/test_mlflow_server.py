"""A run told to a real MLflow server, which has an environment of its own: `make test-mlflow`."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rgalign_ray import config, storage
from rgalign_ray.loop import controller
from rgalign_ray.loop.tracking import METRICS_A_REQUEST, Tracker
from rgalign_ray.ops.local_cluster import free_port

PROGRAM = os.environ.get("RGALIGN_MLFLOW")
"""The `mlflow` of that environment."""
START_S = 90.0

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="MLflow has an environment of its own: make test-mlflow")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    process = subprocess.Popen(
        [str(PROGRAM), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store],
        stdout=(folder / "log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_a_run_is_told_once_however_often_it_is_resumed(server: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    told = [f"run_dir={tmp_path}", "tracking.to=[mlflow]", f"tracking.mlflow_uri={server}", "world.sessions=300"]
    for until in ("log", "sessions", "sessions"):
        controller.run(config.load("smoke", told), until=until)
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("rgalign")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("smoke", "FINISHED")
    assert run.data.params["world.sessions"] == "300" and run.data.params["ranker.dim"] == "16"
    assert run.data.metrics["log/rows/sessions"] == 300.0
    assert len(client.get_metric_history(run.info.run_id, "log/rows/sessions")) == 1

    many = METRICS_A_REQUEST + 5
    tracker = Tracker(config.load("smoke", told))
    tracker.stage(storage.Manifest(stage="long", key="k", figures={"loss": [float(step) for step in range(many)]}))
    history = client.get_metric_history(run.info.run_id, "long/loss")
    assert sorted((each.step, each.value) for each in history) == [(step, float(step)) for step in range(many)]
