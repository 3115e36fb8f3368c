"""Popularity: each intent's share of clicks, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from rgalign_ray.ranker.base import Batch, Ranker


class Popularity(Ranker):
    """score_i = prior_i; there is nothing to train."""

    kind = "popularity"
    reads_text = False
    trained = False

    def users(self, batch: Batch) -> None:
        """Nothing is read of a session."""

    def items(self) -> Tensor:
        """[I, 0]: an intent is its base rate."""
        return torch.zeros(self.sizes.num_intents, 0, device=self.prior.device)

    def score(self, u: None, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C]: the prior of `candidates` [B, C]."""
        return self.prior[candidates.clamp(min=0).long()]
