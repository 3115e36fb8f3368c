"""AutoInt + mixture of experts against the item tower, joined by a dot product: the rival without an LLM."""

from __future__ import annotations

from torch import Tensor

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.towers import ItemTower, UserTower


class TwoTower(Ranker):
    """⟨u, v_i⟩/√d + prior_i with the very user and item towers of QE-Rec; it reads no query."""

    kind = "two_tower"

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.user_tower = UserTower(sizes, settings)
        self.item_tower = ItemTower(sizes, settings, text=self.reads_text)

    def users(self, batch: Batch) -> Tensor:
        """u [B, d]."""
        return self.user_tower(batch)

    def relevance(self, u: Tensor, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from u [B, d] and v [B, C, d]."""
        return (v @ u[..., None]).squeeze(-1) * u.shape[-1] ** -0.5
