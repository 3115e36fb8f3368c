"""What counts as the death of a training process; real ones die in tests/cluster/test_ray_train.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from rgalign_ray import ray_train
from rgalign_ray.config import Trained
from rgalign_ray.errors import InfrastructureError

KILLED = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
AT_WORK = WorkerGroupError("rank 0", {0: WorkerHealthCheckFailedError("no answer", KILLED)})
AS_IT_STARTS = ControllerError(KILLED)
STOPPED = WorkerGroupError("rank 0", {0: WorkerHealthCheckTimeoutError("no answer")})


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
            backend="gloo",
            storage_uri=str(tmp_path),
            name="killed",
        )

    with pytest.raises(
        InfrastructureError, match=r"ranker: a training process died, or hung, 2 times, with ranker\.retries = 1"
    ):
        run(retries=1)
    met.append(error)
    assert run(retries=1) == "done"
