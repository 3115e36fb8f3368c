"""RG-SFT: the reasoner learns to write the query that the ranker judged best.

TRL's SFTTrainer over the sampled token ids themselves (no second tokenisation): loss on the completion
only, NEFTune noise on the embeddings (Jain et al., 2023). What the prompts of a micro-batch begin with is read once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from rgalign_ray import config, storage
from rgalign_ray.learner import engine, trl_trainer
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.learner.token_rows import Layout
from rgalign_ray.reasoner import models


class _Queries(trl_trainer.Scheduled, SFTTrainer):
    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.neftune_noise_alpha is not None:  # the noise is by a row's length, which is not the pass's
            width, longest = inputs["input_ids"].shape[1], int(inputs["position_ids"].max()) + 1
            of = self.accelerator.unwrap_model(model).get_input_embeddings()
            of.neftune_noise_alpha = self.neftune_noise_alpha * math.sqrt(width / longest)
        return super().training_step(model, inputs, *args, **kwargs)


class _MicroBatch:
    """Makes a micro-batch of rows as the layout says."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        tokens, prompts = [row["input_ids"] for row in rows], [row["labels"].count(engine.IGNORE) for row in rows]
        # each keeps its prompt's last token, which its completion's first is predicted from
        laid = self.layout(tokens, torch.device("cpu"), at_most=min(prompts) - 1)
        labels = torch.full_like(laid.inputs["input_ids"], engine.IGNORE)
        for row, (ids, prompt) in enumerate(zip(tokens, prompts, strict=True)):
            first = laid.place(row, prompt)
            labels.view(-1)[first : first + len(ids) - prompt] = torch.tensor(ids[prompt:])
        return laid.inputs | {"labels": labels}


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
    tokenizer = models.load_tokenizer(task.reasoner.model)

    def trainer(arguments: dict[str, Any]) -> _Queries:
        model = engine.trainable(task)
        return _Queries(
            model=model,
            args=SFTConfig(
                **arguments,
                neftune_noise_alpha=settings.neftune_alpha or None,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                activation_checkpointing=False,
            ),
            data_collator=_MicroBatch(Layout(model, tokenizer.pad_token_id)),
            train_dataset=trl_trainer.in_order(rows, task),
            processing_class=tokenizer,
        )

    return {"sessions": len(rows), **trl_trainer.run(task, host, trainer, {"loss": "loss"})}
