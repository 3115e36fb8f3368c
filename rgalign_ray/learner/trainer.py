"""What objectives on TRL's trainers share: arguments, progress, and a trainer's whole life."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Advance, LearnerTask


def arguments(task: LearnerTask, scratch: str) -> dict[str, Any]:
    """Arguments of every trainer: what the task says, nothing saved, nothing reported, a DeepSpeed engine underneath.

    Args:
        scratch: folder that the trainer asks for and leaves empty.
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
    task: LearnerTask, advance: Advance, make: Callable[[dict[str, Any]], Trainer], curves: Mapping[str, str]
) -> dict[str, Any]:
    """Trains to the end and exports the reasoner.

    Args:
        make: the trainer, from the arguments that all share.
        curves: what the trainer logs at each optimiser step, by the name it has in the figures.

    Returns:
        figures: `steps`, and each curve.
    """
    engine.forbid_compilation()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make(arguments(task, scratch))
        trainer.remove_callback(PrinterCallback)  # the curves are in the figures
        trainer.add_callback(_Progress(advance))
        trainer.train()
        engine.export(trainer.accelerator.unwrap_model(trainer.model), task)
    unset_hf_deepspeed_config()  # while it lives under ZeRO-3, this process loads every model in parts
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": len(log)} | {name: [entry[key] for entry in log] for name, key in curves.items()}


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
