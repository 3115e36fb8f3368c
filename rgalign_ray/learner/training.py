"""Learners as Ray Train workers: each rank one DeepSpeed engine, gloo on CPU and NCCL on GPU, by the same code.

fit ──▶ rank 0 … n: objective.train(task, host) ── state, now and then ──▶ Ray Train's checkpoint
              ▲                                                                   │
              └──── a rank that died, or the same command again: from there on ───┘

Without workers (`learner.workers` 0) the calling process is the one rank, and keeps no state.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError

from rgalign_ray import config, progress, ray_metrics, ray_train, storage
from rgalign_ray.learner.engine import Host, LearnerTask, save

if TYPE_CHECKING:  # the driver, which starts learners, need not load what they do
    from transformers import PreTrainedModel

    from rgalign_ray.learner.groups import JudgedGroup

CHECKPOINT_EVERY_S = 30.0
"""At most one checkpoint in this time,"""
CHECKPOINT_SHARE = 0.05
"""and at most this share of the time for writing them."""
TAKE = 4.0
"""Deadlines of a rollout unit after which groups are overdue; the stream's own is shorter."""
STEP = "step.json"
"""File of a checkpoint that tells how many optimiser steps it has behind it."""


def fit(
    task: LearnerTask,
    steps: int,
    storage_uri: str,
    name: str,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    while_waiting: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs one objective on `task.learner.workers` workers, or in this process, and returns the figures of rank 0.

    A worker that dies is started again with the others, up to `learner.retries` times; they go on from the last
    checkpoint, and so does a second call of the same name after this process has died.

    Args:
        task: the objective's work.
        steps: optimiser steps, for the progress display.
        storage_uri: folder for Ray Train's own records; what this run leaves there is removed at its end.
        name: Ray Train's run name; unique to the work, since Ray Train resumes an equal name by itself.
        checkpoint_every_s: least time between two checkpoints.
        while_waiting: called each minute that the cluster has no room for the workers; what it raises ends the run.

    Raises:
        InfrastructureError: when workers died more often than that.
    """
    learner = task.learner
    if not learner.workers:
        group_of_one()
        with _progress(task, steps, 0) as advance:
            return _objective(task).train(task, ShownHost(advance))
    if task.stream:  # a learner that waits for groups is not at fault
        patience = learner.deadline_s + TAKE * task.rollout.deadline_s
        learner = learner.model_copy(update={"deadline_s": patience})
    figures: dict[str, Any] = ray_train.run(
        _worker,
        {"task": task, "steps": steps, "every_s": checkpoint_every_s},
        learner,
        section="learner",
        storage_uri=storage_uri,
        name=name,
        while_waiting=while_waiting,
    )
    storage.delete(storage.join(storage_uri, name))
    return figures


def _worker(loop: dict[str, Any], alive: ray_train.Alive) -> dict[str, Any]:
    task: LearnerTask = loop["task"]
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every checkpoint otherwise
    objective = _objective(task)
    with _last_checkpoint() as (folder, done), _progress(task, loop["steps"], done) as advance:
        host = TrainHost(folder, done, _both(advance, alive), loop["every_s"], task.device)
        more = {"source": StreamSource(task, host)} if task.stream else {}
        return objective.train(task, host, **more)


def _objective(task: LearnerTask) -> ModuleType:
    """Its module, for a process that is set up as the task says."""
    torch.set_num_threads(task.reasoner.threads)
    os.environ["DS_ACCELERATOR"] = "cuda" if task.learner.use_gpu else "cpu"  # else DeepSpeed guesses on import
    return importlib.import_module(f"rgalign_ray.learner.{task.objective}")


def _both(advance: progress.Advance, alive: ray_train.Alive) -> progress.Advance:
    def step(number: int) -> None:
        alive()
        advance(number)

    return step


@contextmanager
def _last_checkpoint() -> Iterator[tuple[str | None, int]]:
    """Folder, and optimiser steps, of the state that an earlier try left; None and 0 where there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, 0
        return
    with checkpoint.as_directory() as folder:
        yield folder, storage.read_json(storage.join(folder, STEP))


@contextmanager
def _progress(task: LearnerTask, steps: int, done: int) -> Iterator[progress.Advance]:
    if dist.get_rank() > 0:
        yield lambda n: None
        return
    if done:
        progress.note(f"RG-{task.objective} goes on from step {done}")
    told = ray_metrics.counter("learner_steps")
    with progress.track(f"RG-{task.objective}", steps, "steps", before=done) as shown:

        def advance(number: int) -> None:
            shown(number)
            told.inc(number, tags={"objective": task.objective})

        yield advance


class ShownHost(Host):
    """Shows progress, and keeps no state.

    Args:
        advance: called after each optimiser step.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def advance(self, steps: int) -> None:
        self._advance(steps)


class TrainHost(ShownHost):
    """Shows rank 0's progress, and keeps states as checkpoints of Ray Train.

    Args:
        folder: of the last checkpoint, if there is one.
        step: optimiser steps that it has behind it.
        advance: called after each optimiser step.
        every_s: least time between two checkpoints.
        device: where the ranks agree whether one is due.
    """

    def __init__(
        self, folder: str | None, step: int, advance: Callable[[int], None], every_s: float, device: torch.device
    ) -> None:
        super().__init__(advance)
        self.resume_from = folder
        self._kept = self._reported = step
        self.every_s, self.device = every_s, device
        self._asked = self._last = time.monotonic()

    def due(self) -> bool:
        self._asked = time.monotonic()
        answer = torch.tensor(float(self._asked - self._last >= self.every_s), device=self.device)
        dist.broadcast(answer, src=0)  # clocks differ, and a checkpoint needs all ranks
        return bool(answer)

    def keep(self, folder: str, step: int) -> None:
        if dist.get_rank() == 0:
            storage.write_json(str(Path(folder, STEP)), step)
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._reported = step
        self._last = time.monotonic()
        self.every_s = max(self.every_s, (self._last - self._asked) / CHECKPOINT_SHARE)

    @property
    def kept(self) -> int:
        """Optimiser steps of the checkpoint from which another try would go on, were this one to die now.

        Ray Train goes on from what its controller has registered. That polls the ranks every other second, and may
        hear of a report from one of them a poll before it hears of it from the others.
        """
        if self._kept < self._reported:
            committed = ray.train.CheckpointConsistencyMode.COMMITTED
            registered = ray.train.get_all_reported_checkpoints(committed, timeout_s=0.0)  # as far as it is by now
            self._kept = max([self._kept, *(each.metrics["step"] for each in registered)])
        return self._kept


class StreamSource:
    """Judged groups from the actor that `task.stream` names, to which rank 0 tells of new weights.

    Weights after t steps are written as rank 0 asks for the groups of step t: those of step t + S, with staleness S,
    are sampled with them.
    """

    def __init__(self, task: LearnerTask, host: TrainHost) -> None:
        assert task.stream is not None and isinstance(task.optimisation, config.Grpo)
        self.task, self.host, self.weights = task, host, task.stream.weights
        self.stream = ray.get_actor(task.stream.actor)
        if dist.get_rank() == 0:
            step = host.kept
            earlier = range(max(step - task.optimisation.staleness, 1), step)
            restart = self.stream.restart.remote(step, {version: self._weights(version) for version in earlier})
            ray.get(restart, timeout=task.rollout.deadline_s)
        dist.barrier()

    def take(self, model: PreTrainedModel, step: int, places: Sequence[int]) -> list[JudgedGroup]:
        patience = self.task.rollout.deadline_s
        if step > 0 and dist.get_rank() == 0:
            weights = self._weights(step)
            save(model, self.task, weights, f"{self.task.version}.{step}")
            for old in ray.get(self.stream.publish.remote(step, weights, self.host.kept), timeout=patience):
                storage.delete(old)
        try:
            return ray.get(self.stream.take.remote(step, places), timeout=patience * TAKE)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None

    def _weights(self, version: int) -> str:
        return storage.join(self.weights, f"{version:06d}")


def group_of_one() -> None:
    """Makes a process group for objectives that run in this process without Ray Train: DeepSpeed insists on one.

    It stays until the process ends: DeepSpeed remembers its first group, and a second would be foreign to it.
    """
    if dist.is_initialized():
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
