"""A run submitted to a cluster of this machine, with its run directory in an object store; the head dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.fs as pafs
import pytest
import s3_server
from quiet_run import SETTINGS as QUIET
from quiet_run import QuietRun

from rgalign_ray import storage
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.ops import local_cluster

pytestmark = [pytest.mark.slow]

RUN = f"s3://{s3_server.BUCKET}/submitted"
SETTINGS = [*QUIET, "--set", "name=shop"]
PLANTED = "a-key-that-must-stand-nowhere"
LAST = "rankers_0"
DEADLINE_S = 600.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An object store, an own token, and a key in the environment, as a user has them."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    with s3_server.serving() as port:
        for name, value in s3_server.environment(port).items():
            monkeypatch.setenv(name, value)
        yield
        rgalign("cluster", "down")


def rgalign(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rgalign_ray.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def done(*arguments: str) -> str:
    ended = rgalign(*arguments)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout + ended.stderr


def until_there(artefact: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while storage.read_manifest(storage.join(RUN, artefact)) is None:
        assert time.monotonic() < until, rgalign("status").stdout
        time.sleep(0.5)


def kill_the_head() -> None:
    """Every process of the cluster at once, as a machine that loses its power."""
    cluster = local_cluster.running()
    assert cluster is not None
    head = psutil.Process(cluster.nodes[0].pid)
    processes = [head, *head.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself, or of the one killed just before it
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def node_labels() -> list[dict[str, str]]:
    """Asked by a process of its own: this one has the token of the other Ray."""
    cluster = local_cluster.running()
    assert cluster is not None
    told = subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "list",
            "nodes",
            f"--address={cluster.dashboard}",
            "--format=json",
        ],
        env=os.environ | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [node["labels"] for node in json.loads(told.stdout)]


@pytest.mark.fault
def test_a_run_survives_its_cluster(ray_cluster: object, quiet_run: QuietRun, store: None, tmp_path: Path) -> None:
    """Beside another Ray of the same machine, which has the ports that Ray takes by itself."""
    told = done("cluster", "up")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    refused = rgalign("cluster", "up")
    assert refused.returncode == ConfigError.exit_code and "one is up already" in refused.stderr

    told += done("submit", "train_ranker", *SETTINGS, "--run-dir", RUN, "--no-wait")
    twice = rgalign("submit", "prepare", *SETTINGS, "--run-dir", RUN)
    assert twice.returncode == ConfigError.exit_code and "is at work on" in twice.stderr
    too_large = rgalign("submit", "loop", *SETTINGS, "--run-dir", f"{RUN}-2", "--set", "ranker.workers=99")
    assert too_large.returncode == ConfigError.exit_code and too_large.stderr.startswith("error: ranker.workers: 99 x")
    stranger = subprocess.run(
        [sys.executable, "-m", "rgalign_ray.cli", "status"],
        env=os.environ | {"RAY_AUTH_TOKEN": "of another"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stranger.returncode == InfrastructureError.exit_code and stranger.stderr.count("\n") == 1

    until_there("features")
    assert "running" in done("status", "shop")
    kill_the_head()
    gone = rgalign("status")
    assert gone.returncode == ConfigError.exit_code and "`rgalign cluster up` starts one" in gone.stderr

    told += done("cluster", "up")
    assert "2 node(s)" in done("cluster", "add", "--label", "rgalign=rollout")
    assert [labels["rgalign"] for labels in node_labels() if "rgalign" in labels] == ["rollout"]
    unknown = rgalign("resume", "shop")
    assert unknown.returncode == ConfigError.exit_code and "no run of that name" in unknown.stderr
    told += done("submit", "prepare", *SETTINGS, "--run-dir", RUN)
    assert "features · fit the feature space · done already" in told.replace("\n", " ")
    done("submit", "train_ranker", *SETTINGS, "--run-dir", RUN, "--no-wait")
    assert "stopped" in done("stop", "shop")
    told += done("resume", "shop")
    assert f"{LAST} · train" in done("logs", "shop")
    assert "succeeded" in done("status", "shop")

    assert contents(storage.join(RUN, LAST)) == contents(str(quiet_run.folder / LAST))
    fs, _ = storage.filesystem(RUN)
    stands_nowhere(fs, PLANTED, s3_server.SECRET, (tmp_path / "token").read_text())
    assert PLANTED not in told and s3_server.SECRET not in told
    assert done("cluster", "down").startswith("2 node(s)")
    assert local_cluster.running() is None


def contents(artefact: str) -> dict[str, bytes]:
    """Its files but for the manifest, which tells how long it took."""
    fs, root = storage.filesystem(artefact)
    found = {}
    for file in storage.list_files(artefact):
        path = storage.filesystem(file)[1]
        if not path.endswith(storage.MANIFEST):
            with fs.open_input_stream(path) as stream:
                found[path.removeprefix(root)] = stream.read()
    assert found
    return found


def stands_nowhere(fs: pafs.FileSystem, *secrets: str) -> None:
    files = storage.list_files(f"s3://{s3_server.BUCKET}")
    assert len(files) > 20
    for file in files:
        with fs.open_input_stream(storage.filesystem(file)[1]) as stream:
            content = stream.read()
        assert not [secret for secret in secrets if secret.encode() in content], file
