"""A run of Ray Train: processes of one torch group that start together, are restarted together, and return a result."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError
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
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from rgalign_ray import config, progress, ray_stacks, storage
from rgalign_ray.errors import InfrastructureError, UserError

LOST_PEER = re.compile(r"connection (closed|reset) by peer|broken pipe|remote process exited", re.IGNORECASE)
"""What gloo and NCCL tell of in the ranks that are left."""
Alive = Callable[[], None]
"""A sign of life."""


def run(
    worker: Callable[[dict[str, Any], Alive], Any],
    argument: dict[str, Any],
    settings: config.Trained,
    *,
    section: str,
    storage_uri: str,
    name: str,
    while_waiting: Callable[[], None] = lambda: None,
    **trainer: Any,
) -> Any:
    """Runs `worker(argument, alive)` in `settings.workers` processes and returns what rank 0 returns.

    When a process dies, or has not called `alive` for `settings.deadline_s`, all start again, up to `settings.retries`
    times; `ray.train.get_checkpoint` gives them what was last reported, also to a later run of the same name. What a
    worker raises ends the run at once. As long as the cluster has no room for the processes, they are waited for, and
    every minute a line says so.

    Args:
        worker: a function of a module.
        argument: what it is called with.
        settings: how many processes, where, with what, and how often they may die.
        section: name of these settings, for the error.
        storage_uri: folder for checkpoints and Ray Train's own records.
        name: unique to the work; Ray Train resumes an equal name by itself.
        while_waiting: called each minute that the cluster has no room; what it raises ends the run.
        trainer: more for `TorchTrainer`, as `datasets`.

    Raises:
        UserError, InfrastructureError: what a worker raised of these.
        InfrastructureError: when processes died more often than that.
        KeyboardInterrupt: at Ctrl-C, when the processes have ended.
        ray.train.TrainingFailedError: when the worker raised anything else.
    """
    stacks = storage.join(storage_uri, f"{name}.{ray_stacks.STACKS}")
    storage.delete(stacks)
    deaths = told = 0
    while True:
        try:
            with _interruptible():
                return _trainer(worker, argument, settings, storage_uri, name, stacks, **trainer).fit().return_value
        except (ControllerError, WorkerGroupError) as error:
            met = [error.controller_failure] if isinstance(error, ControllerError) else error.worker_failures.values()
            if any(isinstance(each, WorkerGroupStartupTimeoutError) for each in met):
                needs = " and ".join(f"{amount:g} {resource}" for resource, amount in _resources(settings).items())
                progress.note(f"{section}: waits for {settings.workers} processes' room on the cluster, {needs} each")
                while_waiting()
                continue
            causes = (getattr(each, "_base_exc", each) for each in met)  # Ray Train keeps them beside their tracebacks
            if told_by_worker := [each for each in causes if isinstance(each, (UserError, InfrastructureError))]:
                raise told_by_worker[0] from None
            if not all(_died(each) or LOST_PEER.search(str(each)) for each in met):
                raise
            hung = storage.entries(stacks)
            if len(hung) > told:
                told = len(hung)
                progress.note(
                    f"{section}: no step for {settings.deadline_s:g} s; what the processes were at stands in {stacks}"
                )
            deaths += 1
            if deaths > settings.retries:
                if not any(map(_died, met)):
                    raise
                raise InfrastructureError(
                    f"{section}: a training process died, or hung, {deaths} times, with {section}.retries = "
                    f"{settings.retries}; the same command goes on from the last checkpoint."
                ) from error


def _resources(settings: config.Trained) -> dict[str, float]:
    """Of one process."""
    return {"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})}


def _trainer(
    worker: Callable[[dict[str, Any], Alive], Any],
    argument: dict[str, Any],
    settings: config.Trained,
    storage_uri: str,
    name: str,
    stacks: str,
    **more: Any,
) -> TorchTrainer:
    """One attempt of `run`; what processes that hang were at goes to folder `stacks`."""
    fs, path = storage.filesystem(storage_uri)
    backend = "cpu:gloo,cuda:nccl" if settings.use_gpu else "gloo"  # figures are summed on CPUs in either case
    return _Trainer(
        partial(_watched, worker, settings.deadline_s),
        train_loop_config=argument,
        # longer than a process may take, so that a peer that waits for it is not the one to raise
        torch_config=TorchConfig(backend=backend, timeout_s=2 * math.ceil(settings.deadline_s)),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            label_selector=settings.node_labels or None,
            resources_per_worker=_resources(settings),
        ),
        run_config=RunConfig(
            logging_config=LoggingConfig(log_level="ERROR"),
            name=name,
            storage_path=path,
            storage_filesystem=fs,
            # deaths are counted in `run`: Ray Train counts none of those that happen while the workers start
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=[_Placement(), _Stacks(stacks)],
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
        **more,
    )


def _died(failure: BaseException) -> bool:
    """Whether it tells of a process that is gone; one that Ray's memory monitor kills has an error of its own."""
    met = getattr(failure, "health_check_failure", failure)
    return isinstance(
        met, (RayActorError, OutOfMemoryError, WorkerGroupStartupFailedError, WorkerHealthCheckTimeoutError)
    )


def _watched(worker: Callable[[dict[str, Any], Alive], Any], deadline_s: float, argument: dict[str, Any]) -> Any:
    with ray_stacks.watched(deadline_s) as alive:
        return worker(argument, alive)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes Ctrl-C to itself: it ends the process with status 0, and it does so long after its run."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


class _Trainer(TorchTrainer):
    """Without Ray Train's actor that gives back what a killed controller held.

    It asks the dashboard whether the controller lives, waits ten seconds for an answer where there is no dashboard, as
    on this machine, and every run waits for it as it ends. Where a controller dies the driver ends, and Ray gives back
    what was the driver's.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


class _Stacks(WorkerGroupCallback):
    """Keeps what processes were at that ended themselves, having shown no step for too long.

    Args:
        folder: where, a file a process.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        status = worker_group.get_latest_poll_status()
        for worker in worker_group.get_workers() if status and status.errors else ():
            stacks = ray_stacks.overdue(worker.metadata.node_id, worker.actor._actor_id.hex())
            if stacks:
                rank = worker.distributed_context.world_rank
                place = storage.join(self.folder, f"{worker.metadata.pid}-rank-{rank}.txt")
                storage.write_bytes(place, stacks.encode())


class _Placement(WorkerGroupCallback, ControllerCallback):
    """Gives back what a group held that dies between its start and its first step.

    Ray Train forgets its placement group then, and Ray keeps it until the driver ends: the next group would wait for
    these CPUs for ever.
    """

    def __init__(self) -> None:
        self.handle: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.handle = worker_group.get_worker_group_state().placement_group_handle

    async def before_controller_shutdown(self) -> None:
        self.before_controller_abort()

    def before_controller_abort(self) -> None:
        if self.handle is not None:
            self.handle.shutdown()
