"""What a user is told of a run of Ray Train that fails."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.train
import torch
from ray.train import WorkerGroupError

from rgalign_ray import ray_train
from rgalign_ray.config import Trained
from rgalign_ray.errors import DataError, InfrastructureError
from rgalign_ray.learner.training import TrainHost
from rgalign_ray.ranker.group import Group

DEADLINE_S = 10.0


def dies(argument: dict[str, Any], alive: ray_train.Alive) -> float:
    """Rank 1 dies in its first tries: at once in some, in the others after both have met; rank 0 waits for it."""
    rank, tries = ray.train.get_context().get_world_rank(), Path(argument["tries"])
    if rank == 1:
        with tries.open("a") as file:
            file.write(".")
        if len(tries.read_text()) <= argument["at_start"]:
            os.kill(os.getpid(), signal.SIGKILL)
    Group().sum(np.ones(1))
    ray.train.report({})
    if rank == 1 and len(tries.read_text()) <= argument["at_start"] + argument["later"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(Group().sum(np.ones(1))[0])


def refuses(argument: dict[str, Any], alive: ray_train.Alive) -> None:
    """Rank 1 has something to tell the user, which ends rank 0's connection too."""
    if ray.train.get_context().get_world_rank() == 1:
        raise DataError("the log has no click.")
    Group().sum(np.ones(1))


def raises(argument: dict[str, Any], alive: ray_train.Alive) -> None:
    """Rank 1 has a bug, which ends rank 0's connection too."""
    if ray.train.get_context().get_world_rank() == 1:
        with Path(argument["tries"]).open("a") as file:
            file.write(".")
        raise ValueError("a bug")
    Group().sum(np.ones(1))


def interrupts(argument: dict[str, Any], alive: ray_train.Alive) -> None:
    """Ctrl-C at the driver, while both ranks are at work."""
    if ray.train.get_context().get_world_rank() == 0:
        os.kill(argument["driver"], signal.SIGINT)
    Group().sum(np.ones(1))
    threading.Event().wait(600)


def keeps(argument: dict[str, Any], alive: ray_train.Alive) -> tuple[int, int]:
    """What counts as kept as soon as a learner's host has reported it, and in the end."""
    host = TrainHost(None, 0, lambda steps: None, 0.0, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        host.keep(folder, 3)
    at_once, until = host.kept, time.monotonic() + 60
    while host.kept == at_once and time.monotonic() < until:
        time.sleep(0.1)
    return at_once, host.kept


def hangs(argument: dict[str, Any], alive: ray_train.Alive) -> float:
    """Rank 1 shows signs of life for longer than its deadline; in the first try it is silent then, and rank 0 waits."""
    first = not Path(argument["tries"]).exists()
    Group().sum(np.ones(1))
    for _ in range(4):
        alive()
        time.sleep(DEADLINE_S / 2)
    alive()
    if first and ray.train.get_context().get_world_rank() == 1:
        Path(argument["tries"]).touch()
        is_stuck()
    return float(Group().sum(np.ones(1))[0])


def is_stuck() -> None:
    threading.Event().wait(600)


def run(
    worker: Any,
    folder: Path,
    retries: int,
    at_start: int = 0,
    later: int = 0,
    deadline_s: float = 600.0,
    **more: Any,
) -> Any:
    return ray_train.run(
        worker,
        {"tries": str(folder / "tries"), "at_start": at_start, "later": later, "driver": os.getpid()},
        Trained(retries=retries, deadline_s=deadline_s),
        section="ranker",
        storage_uri=str(folder / "train"),
        name="fails",
        **more,
    )


@pytest.mark.fault
@pytest.mark.slow
def test_workers_that_die_too_often_are_one_sentence(ray_cluster: object, tmp_path: Path) -> None:
    with pytest.raises(
        InfrastructureError, match=r"ranker: a training process died, or hung, 2 times, with ranker\.retries = 1"
    ):
        run(dies, tmp_path, retries=1, at_start=1, later=9)
    assert (tmp_path / "tries").read_text() == "..", "deaths of both kinds count"


@pytest.mark.fault
@pytest.mark.slow
def test_workers_that_die_are_started_again(ray_cluster: object, tmp_path: Path) -> None:
    assert run(dies, tmp_path, retries=2, at_start=1, later=1) == 2.0
    assert (tmp_path / "tries").read_text() == "..."
    held = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    assert not held, "what died has left its CPUs"


@pytest.mark.fault
@pytest.mark.slow
def test_a_process_that_hangs_is_started_again_and_what_it_was_at_is_kept(
    ray_cluster: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(hangs, tmp_path, retries=1, deadline_s=DEADLINE_S) == 2.0
    stacks = {file.stem.partition("-")[2]: file.read_text() for file in (tmp_path / "train/fails.stacks").iterdir()}
    assert "in is_stuck" in stacks["rank-1"]
    sentence = f"ranker: no step for {DEADLINE_S:g} s; what the processes were at stands in {tmp_path}/train/fails"
    assert sentence in capfd.readouterr().err.replace("\n", "")


@pytest.mark.slow
def test_a_state_counts_as_kept_when_another_try_would_go_on_from_it(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "5")
    assert run(keeps, tmp_path, retries=0) == (0, 3)


@pytest.mark.slow
def test_room_that_others_hold_is_waited_for(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    other = ray.util.placement_group([{"CPU": 2}])
    ray.get(other.ready(), timeout=60)
    threading.Timer(15, ray.util.remove_placement_group, [other]).start()
    assert run(dies, tmp_path, retries=0) == 2.0
    assert "ranker: waits for 2 processes' room on the cluster, 0.5 CPU each" in capfd.readouterr().err


@pytest.mark.slow
def test_a_wait_for_room_ends_when_it_is_told_to(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    other = ray.util.placement_group([{"CPU": 2}])
    ray.get(other.ready(), timeout=60)
    told: list[str] = []

    def tell() -> None:
        told.append("minute")
        if len(told) == 2:
            raise InfrastructureError("another part has failed.")

    try:
        with pytest.raises(InfrastructureError, match="another part has failed"):
            run(dies, tmp_path, retries=0, while_waiting=tell)
    finally:
        ray.util.remove_placement_group(other)


@pytest.mark.slow
def test_ctrl_c_is_an_interrupt_while_processes_train_and_afterwards(ray_cluster: object, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(interrupts, tmp_path, retries=0)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_worker_tells_the_user_is_told_as_it_is(ray_cluster: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^the log has no click\.$"):
        run(refuses, tmp_path, retries=2)


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(ray_cluster: object, tmp_path: Path) -> None:
    with pytest.raises(WorkerGroupError, match="ValueError: a bug"):
        run(raises, tmp_path, retries=2)
    assert len((tmp_path / "tries").read_text()) == 1, "it is not tried again"
