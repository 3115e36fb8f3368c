"""RG-SFT: the reasoner learns to write the query that the ranker judged best.

TRL's SFTTrainer over the sampled token ids themselves (no second tokenisation): loss on the completion
only, NEFTune noise on the embeddings (Jain et al., 2023).
"""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from rgalign_ray import config, storage
from rgalign_ray.learner import engine, trl_trainer
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.reasoner import models


class _Queries(trl_trainer.Scheduled, SFTTrainer):
    pass


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Fine-tunes on `selected` and exports the reasoner.

    Args:
        task: data, weights and settings; `task.optimisation` is `config.Sft`.
        host: hears of each optimiser step, and keeps the state.

    Returns:
        figures: `sessions`, `steps`, and `loss`, the mean loss of each optimiser step (nats per token).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Sft)
    selected = storage.read_table(storage.join(task.data, engine.SELECTED)).select(["prompt_ids", "completion_ids"])
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "labels": [engine.IGNORE] * len(row["prompt_ids"]) + row["completion_ids"],
        }
        for row in selected.to_pylist()
    ]
    figures = trl_trainer.run(
        task,
        host,
        lambda arguments: _Queries(
            model=engine.trainable(task),
            args=SFTConfig(
                **arguments,
                neftune_noise_alpha=settings.neftune_alpha or None,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                activation_checkpointing=False,
            ),
            train_dataset=trl_trainer.in_order(rows, task),
            processing_class=models.load_tokenizer(task.reasoner.model),
        ),
        {"loss": "loss"},
    )
    return {"sessions": len(rows), **figures}
