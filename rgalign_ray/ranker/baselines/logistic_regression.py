"""Multinomial logistic regression: one weight per intent and feature value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes


class LogisticRegression(Ranker):
    """score_i = prior_i + Σ w[value, i] over the fields, plus the mean over a multi-valued field's values and
    over the events; all weights start at zero. Intents that training never showed keep their prior.
    """

    kind = "lr"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.field = nn.Embedding(sizes.field_size, sizes.num_intents)
        self.multi = nn.Embedding(max(sizes.multi_size, 1), sizes.num_intents, padding_idx=0)
        self.event = nn.Embedding(sizes.history_size, sizes.num_intents, padding_idx=0)
        for table in (self.field, self.multi, self.event):
            nn.init.zeros_(table.weight)

    def users(self, batch: Batch) -> Tensor:
        """Logits of the whole knowledge base, [B, I]."""
        ids = batch["multi"].flatten(1)
        multi = self.multi(ids).sum(dim=1) / (ids > 0).sum(dim=1, keepdim=True).clamp(min=1)
        history = batch["history"]
        events = self.event(history).sum(dim=1) / (history > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.field(batch["fields"]).sum(dim=1) + multi + events

    def items(self) -> Tensor:
        """[I, 0]: an intent is its column of the weights."""
        return torch.zeros(self.sizes.num_intents, 0, device=self.prior.device)

    def score(self, u: Tensor, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C]: of the logits u [B, I] those of `candidates` [B, C]."""
        return (u + self.prior).gather(1, candidates.clamp(min=0).long())
