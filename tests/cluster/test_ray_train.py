"""What a user is told of a run of Ray Train that fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
from ray.train import WorkerGroupError
from ray.train.torch import TorchConfig

from rgalign_ray import ray_train
from rgalign_ray.config import Trained
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.ranker.group import Group


def dies(argument: dict[str, Any]) -> float:
    """Rank 1 dies in its first tries, at once or after both have met; rank 0 waits for it."""
    rank, tries = ray.train.get_context().get_world_rank(), Path(argument["tries"])
    if rank == 1:
        with tries.open("a") as file:
            file.write(".")
    if argument["met"]:
        Group().sum(np.ones(1))
        ray.train.report({})
    if rank == 1 and len(tries.read_text()) <= argument["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(Group().sum(np.ones(1))[0])


def raises(argument: dict[str, Any]) -> None:
    """Rank 1 has a bug, which ends rank 0's connection too."""
    if ray.train.get_context().get_world_rank() == 1:
        raise ValueError("a bug")
    Group().sum(np.ones(1))


def run(worker: Any, folder: Path, retries: int, deaths: int = 0, met: bool = True) -> Any:
    return ray_train.run(
        worker,
        {"tries": str(folder / "tries"), "deaths": deaths, "met": met},
        Trained(retries=retries),
        section="ranker",
        torch_config=TorchConfig(backend="gloo"),
        storage_uri=str(folder / "train"),
        name="fails",
    )


@pytest.mark.slow
@pytest.mark.parametrize("met", [True, False])
def test_workers_that_die_too_often_are_one_sentence(ray_cluster: object, tmp_path: Path, met: bool) -> None:
    with pytest.raises(InfrastructureError, match=r"ranker: a training process died 2 times, with ranker\.retries = 1"):
        run(dies, tmp_path, retries=1, deaths=9, met=met)
    assert (tmp_path / "tries").read_text() == ".."


@pytest.mark.slow
def test_a_worker_that_dies_as_it_starts_is_started_again(ray_cluster: object, tmp_path: Path) -> None:
    assert run(dies, tmp_path, retries=1, deaths=1, met=False) == 2.0
    assert (tmp_path / "tries").read_text() == ".."


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(ray_cluster: object, tmp_path: Path) -> None:
    with pytest.raises(WorkerGroupError, match="ValueError: a bug"):
        run(raises, tmp_path, retries=0)
