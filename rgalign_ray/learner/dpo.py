"""RG-DPO: the reasoner learns to prefer the query that the ranker judged best to one that it judged worse.

TRL's DPOTrainer (Rafailov et al., 2023) over the sampled token ids themselves. The reference is the reasoner
that the objective starts from: under LoRA a frozen copy of its adapter, else one more model.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rgalign_ray import config, storage
from rgalign_ray.learner import engine, trl_trainer
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.reasoner import models


class _Pairs(trl_trainer.Scheduled, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        return dataset  # token ids already, as they were sampled


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Optimises preferences on `pairs` and exports the reasoner.

    Args:
        task: data, weights and settings; `task.optimisation` is `config.Dpo`.
        host: hears of each optimiser step, and keeps the state.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss` (nats), `margin` (implicit reward of the chosen
        query above the rejected one's) and `accuracy` (share of pairs in which it is above).
    """
    with trl_trainer.at_hand(task) as task:
        return _train(task, host)


def _train(task: LearnerTask, host: Host) -> dict[str, Any]:
    settings = task.optimisation
    assert isinstance(settings, config.Dpo)
    pairs = storage.read_table(storage.join(task.data, engine.PAIRS))
    rows = pairs.select(["prompt_ids", "chosen_ids", "rejected_ids"]).to_pylist()
    figures = trl_trainer.run(
        task,
        host,
        lambda arguments: _Pairs(
            model=engine.trainable(task),
            args=DPOConfig(**arguments, beta=settings.beta, max_length=None),
            train_dataset=trl_trainer.in_order(rows, task),
            processing_class=models.load_tokenizer(task.reasoner.model),
        ),
        {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"},
    )
    return {"sessions": len(rows), **figures}
