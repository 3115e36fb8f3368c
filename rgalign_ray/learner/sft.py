"""RG-SFT: the reasoner learns to write the query that the ranker judged best.

TRL's SFTTrainer over the sampled token ids themselves (no second tokenisation): loss on the completion
only, NEFTune noise on the embeddings (Jain et al., 2023), a DeepSpeed engine underneath.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from rgalign_ray import config, storage
from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Advance, LearnerTask
from rgalign_ray.reasoner import models

IGNORE = -100
"""Label of a token without loss: all of the prompt."""


def train(task: LearnerTask, advance: Advance) -> dict[str, Any]:
    """Fine-tunes on `selected.parquet` and exports the reasoner.

    Args:
        task: data, weights and settings; `task.optimisation` is `config.Sft`.
        advance: called after each optimiser step.

    Returns:
        figures: `sessions`, `steps`, and `loss`, the mean loss of each optimiser step (nats per token).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Sft)
    selected = storage.read_table(storage.join(task.data, "selected.parquet"))
    rows = Dataset.from_list(
        [
            {
                "input_ids": prompt + completion,
                "labels": [IGNORE] * len(prompt) + completion,
            }
            for prompt, completion in zip(
                selected["prompt_ids"].to_pylist(), selected["completion_ids"].to_pylist(), strict=True
            )
        ]
    )
    engine.forbid_compilation()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=engine.trainable(task),
            args=_arguments(task, settings, scratch),
            train_dataset=rows,
            processing_class=models.load_tokenizer(task.reasoner.model),
            callbacks=[_Progress(advance)],
        )
        trainer.remove_callback(PrinterCallback)  # the curve is in the figures
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        engine.export(trainer.accelerator.unwrap_model(trainer.model), task)
    unset_hf_deepspeed_config()  # while it lives under ZeRO-3, this process loads every model in parts
    return {"sessions": len(rows), "steps": len(losses), "loss": losses}


def _arguments(task: LearnerTask, settings: config.Sft, scratch: str) -> SFTConfig:
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=task.learner.micro_batch,
        gradient_accumulation_steps=task.micro_steps,
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        neftune_noise_alpha=settings.neftune_alpha or None,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        deepspeed=engine.deepspeed_config(task) | {"gradient_accumulation_steps": "auto"},
        use_cpu=not task.learner.use_gpu,
        bf16=task.bf16,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
        data_seed=task.seed,
    )


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
