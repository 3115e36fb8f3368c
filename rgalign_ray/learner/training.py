"""Learners as Ray Train workers: each rank one DeepSpeed engine, gloo on CPU and NCCL on GPU, by the same code."""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rgalign_ray import progress, storage
from rgalign_ray.learner.engine import LearnerTask


def fit(task: LearnerTask, steps: int, storage_uri: str, name: str) -> dict[str, Any]:
    """Runs one objective on `task.learner.workers` workers and returns the figures of rank 0.

    A worker that dies is started again with the others, up to `learner.retries` times; an objective then
    begins anew. With `learner.workers = 0` it runs in this process (for tests).

    Args:
        task: the objective's work.
        steps: optimiser steps, for the progress display.
        storage_uri: folder for Ray Train's own records; what this run leaves there is removed at its end.
        name: Ray Train's run name; unique to the work, since Ray Train resumes an equal name by itself.
    """
    learner = task.learner
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": task, "steps": steps},
        torch_config=TorchConfig(backend="nccl" if learner.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=learner.workers,
            use_gpu=learner.use_gpu,
            resources_per_worker={"CPU": learner.cpus_per_worker, **({"GPU": 1} if learner.use_gpu else {})},
        ),
        run_config=RunConfig(
            logging_config=LoggingConfig(log_level="ERROR"),
            name=name,
            storage_path=storage_uri,
            failure_config=FailureConfig(max_failures=learner.retries),
        ),
    )
    figures = trainer.fit().return_value
    storage.delete(storage.join(storage_uri, name))
    return figures


def _worker(loop: dict[str, Any]) -> dict[str, Any]:
    task: LearnerTask = loop["task"]
    torch.set_num_threads(task.reasoner.threads)
    os.environ["DS_ACCELERATOR"] = "cuda" if task.learner.use_gpu else "cpu"  # else DeepSpeed guesses on import
    objective = importlib.import_module(f"rgalign_ray.learner.{task.objective}")
    group_of_one()
    if dist.get_rank() > 0:
        return objective.train(task, lambda n: None)
    with progress.track(f"RG-{task.objective}", loop["steps"], "steps") as advance:
        return objective.train(task, advance)


def group_of_one() -> None:
    """Makes a process group where there is none: Ray Train's local mode makes none, and DeepSpeed insists on one.

    It stays until the process ends: DeepSpeed remembers its first group, and a second would be foreign to it.
    """
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
