"""A run of Ray Train: processes of one torch group that start together, are restarted together, and return a result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from rgalign_ray import config, storage
from rgalign_ray.errors import InfrastructureError

LOST_PEER = re.compile(r"connection (closed|reset) by peer|broken pipe|remote process exited", re.IGNORECASE)
"""What gloo and NCCL tell of in the ranks that are left."""


def run(
    worker: Callable[[dict[str, Any]], Any],
    argument: dict[str, Any],
    settings: config.Trained,
    *,
    section: str,
    torch_config: TorchConfig,
    storage_uri: str,
    name: str,
    **trainer: Any,
) -> Any:
    """Runs `worker(argument)` in `settings.workers` processes and returns what rank 0 returns.

    When a process dies, all start again, up to `settings.retries` times; `ray.train.get_checkpoint` gives them what
    was last reported, also to a later run of the same name. What a worker raises ends the run at once.

    Args:
        worker: a function of a module.
        argument: what it is called with.
        settings: how many processes, where, with what, and how often they may die.
        section: name of these settings, for the error.
        torch_config: of the torch group.
        storage_uri: folder for checkpoints and Ray Train's own records.
        name: unique to the work; Ray Train resumes an equal name by itself.
        trainer: more for `TorchTrainer`, as `datasets`.

    Raises:
        InfrastructureError: when processes died more often than that.
        ray.train.TrainingFailedError: when the worker raised.
    """
    fs, path = storage.filesystem(storage_uri)

    def attempt() -> Any:
        return TorchTrainer(
            worker,
            train_loop_config=argument,
            torch_config=torch_config,
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.use_gpu,
                label_selector=settings.node_labels or None,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            run_config=RunConfig(
                logging_config=LoggingConfig(log_level="ERROR"),
                name=name,
                storage_path=path,
                storage_filesystem=fs,
                # deaths are counted here: Ray Train counts none of those that happen while the workers start
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
            **trainer,
        ).fit()

    deaths = 0
    while True:
        try:
            return attempt().return_value
        except (ControllerError, WorkerGroupError) as error:
            met = [error.controller_failure] if isinstance(error, ControllerError) else error.worker_failures.values()
            if not all(_died(each) or LOST_PEER.search(str(each)) for each in met):
                raise
            deaths += 1
            if deaths > settings.retries:
                if not any(map(_died, met)):
                    raise
                raise InfrastructureError(
                    f"{section}: a training process died {deaths} times, with {section}.retries = {settings.retries}; "
                    "the same command goes on from the last checkpoint."
                ) from error


def _died(failure: BaseException) -> bool:
    return isinstance(getattr(failure, "health_check_failure", failure), RayActorError)
