"""What counts as the death of a training process; real ones die in tests/cluster/test_ray_train.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from torch.distributed.distributed_c10d import Backend, BackendConfig

from rgalign_ray import ray_train
from rgalign_ray.config import Trained
from rgalign_ray.errors import InfrastructureError

KILLED = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
AT_WORK = WorkerGroupError("rank 0", {0: WorkerHealthCheckFailedError("no answer", KILLED)})
AS_IT_STARTS = ControllerError(KILLED)
STOPPED = WorkerGroupError("rank 0", {0: WorkerHealthCheckTimeoutError("no answer")})


@pytest.mark.fault
@pytest.mark.parametrize("error", [AT_WORK, AS_IT_STARTS, STOPPED], ids=["killed", "killed as it starts", "stopped"])
def test_a_process_that_is_killed_or_stopped_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    met = [error, error]

    class Trainer:
        def __init__(self, *args: object, **settings: object) -> None:
            pass

        def fit(self) -> SimpleNamespace:
            if met:
                raise met.pop()
            return SimpleNamespace(return_value="done")

    monkeypatch.setattr(ray_train, "_Trainer", Trainer)

    def run(retries: int) -> object:
        return ray_train.run(
            len,
            {},
            Trained(retries=retries),
            section="ranker",
            storage_uri=str(tmp_path),
            name="killed",
        )

    with pytest.raises(
        InfrastructureError, match=r"ranker: a training process died, or hung, 2 times, with ranker\.retries = 1"
    ):
        run(retries=1)
    met.append(error)
    assert run(retries=1) == "done"


def test_figures_on_cpus_can_be_summed_where_learners_have_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and counts are collected there."""
    asked: list[TorchConfig] = []

    class Trainer:
        def __init__(self, *args: object, torch_config: TorchConfig, **settings: object) -> None:
            asked.append(torch_config)

        def fit(self) -> SimpleNamespace:
            return SimpleNamespace(return_value=None)

    monkeypatch.setattr(ray_train, "_Trainer", Trainer)
    ray_train.run(len, {}, Trained(use_gpu=True), section="learner", storage_uri=str(tmp_path), name="gpu")
    assert BackendConfig(Backend(asked[0].backend)).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
