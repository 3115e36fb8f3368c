"""Each check finds what it is there for, and nothing where all is well."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rgalign_ray import cli, config, storage
from rgalign_ray.ops import doctor, jobs, local_cluster

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing is wrong."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(32 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 100 * 2**30))
    monkeypatch.setattr(local_cluster, "running", lambda: None)
    for name in ("PORT", "DASHBOARD_PORT"):
        monkeypatch.setattr(local_cluster, name, 0)  # any that is free
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def settings(folder: Path, **changes: Any) -> config.Config:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    given = {"run_dir": str(folder / "run"), "reasoner": {"model": "tiny"}, "serve": {"port": free}}
    return config.validate(given | changes)


def found(check: Any, chosen: config.Config) -> tuple[str, str]:
    finding = check(chosen)
    assert (finding.state == "ok") == (not finding.way_out), "what is wrong has a way out"
    return finding.state, f"{finding.what} → {finding.way_out}"


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    findings = list(doctor.examine(settings(tmp_path)))
    assert {finding.state for finding in findings} == {"ok"}, findings
    assert len({finding.check for finding in findings}) == len(doctor.CHECKS)
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


def test_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.59.0" if name == "ray" else of(name))
    state, told = found(doctor.versions, settings(tmp_path))
    assert state == "failure" and "ray is 2.59.0, not" in told


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["no-such-package>=1", "pytest; extra == 'test'"])
    assert found(doctor.versions, settings(tmp_path))[1].startswith("no-such-package is missing →")


def test_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = settings(tmp_path, reasoner={"vllm": {"python": sys.executable}})
    assert found(doctor.vllm, chosen)[0] == "ok"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    state, told = found(doctor.vllm, chosen)
    assert state == "failure" and "Ray 2.1.0 on Python" in told
    missing = settings(tmp_path, reasoner={"vllm": {"python": "/no/such/python"}})
    assert found(doctor.vllm, missing)[0] == "failure"


def test_processors(tmp_path: Path) -> None:
    chosen = settings(tmp_path, rollout={"workers": 64}, cluster={"num_cpus": 2})
    state, told = found(doctor.processors, chosen)
    assert state == "failure" and told.startswith("rollout.workers: 64 x 0.5 CPUs")


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(2**30))
    assert found(doctor.memory, settings(tmp_path))[1].startswith("1.0 GiB free; the demo needs 8 →")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 64 * 2**20))
    state, told = found(doctor.shared_memory, settings(tmp_path))
    assert state == "warning" and "has 64 MiB, the object store wants 512" in told


@pytest.mark.parametrize(("free", "state"), [(0.5, "failure"), (3.0, "warning"), (6.0, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, int(free * 2**30)))
    assert found(doctor.disk, settings(tmp_path))[0] == state
    assert found(doctor.disk, settings(tmp_path, run_dir="s3://bucket/run"))[0] == "ok"


def test_disk_is_that_of_the_folder_that_a_uri_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or Usage(0, 0, 2**40))
    found(doctor.disk, settings(tmp_path, run_dir=f"file://{tmp_path}/a%20b/run/"))
    assert asked == [tmp_path / "a b"]


def test_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = settings(tmp_path, cluster={"address": "10.0.0.5:6379"})
    place = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(place))
    assert "no token is at hand" in found(doctor.token, chosen)[1]
    place.write_text("secret")
    place.chmod(0o644)
    state, told = found(doctor.token, chosen)
    assert state == "warning" and f"chmod 600 {place}" in told
    place.chmod(0o600)
    assert found(doctor.token, chosen)[0] == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "whoever reaches this machine's ports" in found(doctor.token, settings(tmp_path))[1]


def test_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        assert found(doctor.address, settings(tmp_path, cluster={"address": there}))[0] == "ok"
        assert found(doctor.address, settings(tmp_path, cluster={"address": f"ray://{there}"}))[0] == "ok"
    state, told = found(doctor.address, settings(tmp_path, cluster={"address": there}))
    assert state == "failure" and "does not answer" in told
    assert "is no address" in found(doctor.address, settings(tmp_path, cluster={"address": "somewhere"}))[1]


def test_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", chosen.serve.port))
        other.listen()
        state, told = found(doctor.ports, chosen)
        assert state == "warning" and told.startswith(f"{chosen.serve.port} taken by another program → ")
        assert told.endswith("choose others by serve.port")
        monkeypatch.setattr(local_cluster, "running", lambda: object())
        assert found(doctor.ports, chosen)[0] == "ok"
    monkeypatch.setattr(local_cluster, "running", lambda: None)
    assert found(doctor.ports, chosen)[0] == "ok"


def test_the_cluster_that_jobs_are_submitted_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(tmp_path, reward={"workers": 1, "cpus": 3}, cluster={"num_cpus": 1})
    node = SimpleNamespace(state="ALIVE", labels={}, resources_total={"CPU": 2.0})
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda address: SimpleNamespace(get_address=lambda: address))
    monkeypatch.setattr(jobs, "list_nodes", lambda **_: [node] * 4)
    *others, last = doctor.examine(chosen, "http://there")
    assert {finding.state for finding in others} <= {"ok", "warning"}, "this machine need not hold it"
    assert last.state == "failure" and last.what.startswith(
        "reward.workers: one reward model asks for 3 CPUs on one node"
    )
    node.resources_total["CPU"] = 4.0
    assert [*doctor.examine(chosen, "http://there")][-1].state == "ok"

    def silent(address: str) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(jobs, "JobSubmissionClient", silent)
    last = [*doctor.examine(chosen, "http://there")][-1]
    assert last.state == "failure" and last.what == "--address http://there: nobody there" and last.way_out


def test_a_stale_lock(tmp_path: Path) -> None:
    lock = tmp_path / "extensions/py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert found(doctor.build_cache, settings(tmp_path))[0] == "ok", "a build is going on"
    os.utime(lock, (time.time() - 3600,) * 2)
    state, told = found(doctor.build_cache, settings(tmp_path))
    assert state == "failure" and told.endswith(f"rm {lock}")


def test_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = settings(tmp_path, reasoner={"model": "nobody/no-such-model"})
    assert found(doctor.model, nowhere)[0] == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(doctor.model, nowhere)[0] == "failure"
    assert found(doctor.model, settings(tmp_path, reasoner={"model": str(tmp_path)}))[0] == "failure"


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    state, told = found(doctor.run_folder, settings(tmp_path))
    assert state == "failure" and "cannot be written" in told


def test_a_run_folder_of_a_store_that_refuses_or_of_no_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, told = found(doctor.run_folder, settings(tmp_path, run_dir="nowhere://bucket/run"))
    assert state == "failure" and "no filesystem" in told

    def refuse(uri: str) -> None:
        raise OSError("AWS Error ACCESS_DENIED during HeadObject")

    monkeypatch.setattr(storage, "exists", refuse)
    state, told = found(doctor.run_folder, settings(tmp_path, run_dir="s3://bucket/run"))
    assert state == "failure" and "ACCESS_DENIED" in told


def test_a_probe_leaves_a_run_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    assert found(doctor.run_folder, settings(tmp_path))[0] == "ok"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_the_command_tells_and_exits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr(sys, "argv", ["rgalign", "doctor", "--config", "smoke", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("ok      disk: ")]
    assert [line for line in lines if line.startswith("failure run folder: ")]
    assert "        → name another --run-dir" in lines
