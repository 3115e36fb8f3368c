"""What objectives on TRL's trainers share: arguments, the order of rows, the rate, and a trainer's whole life."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.reasoner import models


def arguments(task: LearnerTask, scratch: str) -> dict[str, Any]:
    """Arguments of every trainer: what the task says, saved when its host asks, nothing reported, DeepSpeed underneath.

    Args:
        scratch: folder for a state on its way to the host.
    """
    settings = task.optimisation
    sizes = dict.fromkeys(("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"), "auto")
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": task.learner.micro_batch,
        "gradient_accumulation_steps": task.micro_steps,
        "num_train_epochs": 1,  # `in_order` has all of them
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.lr,
        "max_grad_norm": settings.max_grad_norm,
        "remove_unused_columns": False,
        "deepspeed": engine.deepspeed_config(task) | sizes,
        "use_cpu": not task.learner.use_gpu,
        "bf16": task.bf16,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": task.seed,
        "data_seed": task.seed,
    }


def in_order(rows: list[dict[str, Any]], task: LearnerTask) -> Dataset:
    """Rows as optimiser steps learn from them, one after another (`engine.in_steps`).

    Left to the trainer, its sampler fills up the last step by how many workers there are.
    """
    steps = engine.in_steps(range(len(rows)), task.optimisation, task.seed)
    return Dataset.from_list(rows).select([row for step in steps for row in step])


@contextmanager
def at_hand(task: LearnerTask) -> Iterator[LearnerTask]:
    """The task with its weights in a folder of this machine: TRL loads a reference from where the model came from."""
    if task.weights is None:
        yield task
        return
    with models.local_copy(task.weights) as folder:
        yield replace(task, weights=folder)


class Scheduled(Trainer):
    """A trainer whose rate is that of `engine.schedule`. Transformers' own begins with a step at rate 0, of which a
    round of one step would learn nothing.
    """

    warmup_ratio: float
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            factor = engine.schedule(num_training_steps, self.warmup_ratio)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def run(
    task: LearnerTask, host: Host, make: Callable[[dict[str, Any]], Scheduled], curves: Mapping[str, str]
) -> dict[str, Any]:
    """Trains to the end, from where an earlier try was if it left a state, and exports the reasoner.

    Args:
        host: hears of each optimiser step, and keeps the state.
        make: the trainer, from the arguments that all share.
        curves: what the trainer logs at each optimiser step, by the name it has in the figures.

    Returns:
        figures: `steps`, and each curve.
    """
    engine.forbid_compilation()
    _project_labels_alone()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it finds that DeepSpeed's configuration is ours
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make(arguments(task, scratch))
            trainer.warmup_ratio = task.optimisation.warmup_ratio
            trainer.remove_callback(PrinterCallback)  # the curves are in the figures
            trainer.add_callback(_ToldToHost(host))
            trainer.train(resume_from_checkpoint=host.resume_from)
            engine.export(trainer.accelerator.unwrap_model(trainer.model), task)
    finally:
        unset_hf_deepspeed_config()  # while it lives under ZeRO-3, this process loads every model in parts
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = {name: [entry[key] for entry in log] for name, key in curves.items()}
    # TRL has None in the place of what is not a number
    return {"steps": len(log)} | {
        name: [math.nan if value is None else value for value in curve] for name, curve in told.items()
    }


def _project_labels_alone() -> None:
    """Lets TRL project onto the vocabulary only the tokens that have a loss, on CPUs as on GPUs.

    It projects every token of the prompt where it has no Triton, to spare compilers changing shapes. On a CPU nothing
    is compiled, and that is half of the time of a step.
    """
    trl.trainer.utils._use_triton = lambda device: True  # what it asks there; its kernels ask elsewhere


class _ToldToHost(TrainerCallback):
    def __init__(self, host: Host) -> None:
        self.host = host

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.host.advance(1)
        control.should_save = state.global_step < state.max_steps and self.host.due()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.host.keep(str(folder), state.global_step)
        shutil.rmtree(folder)
