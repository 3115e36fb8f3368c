"""What objectives on TRL's trainers share: arguments, progress, and a trainer's whole life."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trl.trainer.utils
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Host, LearnerTask


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
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_ratio,
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


def run(
    task: LearnerTask, host: Host, make: Callable[[dict[str, Any]], Trainer], curves: Mapping[str, str]
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
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make(arguments(task, scratch))
        trainer.remove_callback(PrinterCallback)  # the curves are in the figures
        trainer.add_callback(_ToldToHost(host))
        trainer.train(resume_from_checkpoint=host.resume_from)
        engine.export(trainer.accelerator.unwrap_model(trainer.model), task)
    unset_hf_deepspeed_config()  # while it lives under ZeRO-3, this process loads every model in parts
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": len(log)} | {name: [entry[key] for entry in log] for name, key in curves.items()}


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
