"""DeepFM: pairwise products of all embeddings beside an MLP of the same embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.towers import FieldTokens, HistoryEncoder, ItemTower, Joint


class DeepFM(Ranker):
    """Guo et al. 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction".

    The candidate [d] is one more field beside the session's tokens [T, d]. Products among the session's own
    fields are the same for all candidates and matter to the pointwise term alone.
    """

    kind = "deepfm"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        dim = settings.dim
        self.fields = FieldTokens(sizes, dim)
        self.history = HistoryEncoder(sizes, settings)
        self.item_tower = ItemTower(sizes, settings, text=self.reads_text)
        self.first_order = nn.Linear(dim, 1)
        self.joint = Joint((self.fields.number + 1) * dim, dim, settings)
        self.dropout = nn.Dropout(settings.dropout)

    def users(self, batch: Batch) -> Tensor:
        """Tokens [B, T, d]."""
        return torch.cat([self.fields(batch), self.history(batch["history"])[:, None]], dim=1)

    def relevance(self, u: Tensor, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from tokens u [B, T, d] and v [B, C, d]."""
        total = u.sum(dim=1)
        own = 0.5 * (total.square() - u.square().sum(dim=1)).sum(dim=-1)
        pairs = own[:, None] + (v @ total[..., None]).squeeze(-1)
        return pairs * u.shape[-1] ** -0.5 + self.first_order(v).squeeze(-1) + self.joint(self.dropout(u.flatten(1)), v)
