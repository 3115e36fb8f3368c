"""What objectives on TRL's trainers share: arguments, progress, and a trainer's whole life."""

from __future__ import annotations

from collections.abc import Callable
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


def run(task: LearnerTask, advance: Advance, make: Callable[[], Trainer]) -> list[dict[str, float]]:
    """Trains to the end, exports the reasoner, and returns what the trainer logged at each optimiser step."""
    engine.forbid_compilation()
    trainer = make()
    trainer.remove_callback(PrinterCallback)  # the curve is in the figures
    trainer.add_callback(_Progress(advance))
    trainer.train()
    engine.export(trainer.accelerator.unwrap_model(trainer.model), task)
    unset_hf_deepspeed_config()  # while it lives under ZeRO-3, this process loads every model in parts
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
