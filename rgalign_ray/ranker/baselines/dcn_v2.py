"""DCN-v2: explicit feature crosses of growing order beside an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.towers import FieldTokens, HistoryEncoder, ItemTower, Joint

LAYERS = 2


class Cross(nn.Module):
    """x_{l+1} = x_0 ⊙ (U V x_l + b) + x_l over the last axis: [..., size] → [..., size].

    Wang et al. 2021, "DCN V2: Improved Deep & Cross Network", eq. 2, with its weights of rank `rank`.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(size, rank, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(rank, size) for _ in range(LAYERS))

    def forward(self, first: Tensor) -> Tensor:
        x = first
        for down, up in zip(self.down, self.up, strict=True):
            x = first * up(down(x)) + x
        return x


class DCNv2(Ranker):
    """Crosses of the session's own fields [B, T·d] once a session, and of their projection with each
    candidate [B, C, 3·d]; T tokens are the fields and the history.

    One network over fields and candidate together would cross thousands of numbers once a candidate.
    """

    kind = "dcn_v2"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        dim = settings.dim
        self.fields = FieldTokens(sizes, dim)
        self.history = HistoryEncoder(sizes, settings)
        size = (self.fields.number + 1) * dim
        self.item_tower = ItemTower(sizes, settings, text=self.reads_text)
        self.own = Cross(size, dim)
        self.project = nn.Linear(size, 2 * dim)
        self.joined = Cross(3 * dim, 3 * dim)
        self.output = nn.Linear(3 * dim, 1, bias=False)
        self.joint = Joint(size, dim, settings)
        self.dropout = nn.Dropout(settings.dropout)

    def users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """All fields [B, T·d], and their crosses [B, 2·d]."""
        tokens = torch.cat([self.fields(batch), self.history(batch["history"])[:, None]], dim=1)
        flat = self.dropout(tokens.flatten(1))
        return flat, self.project(self.own(flat))

    def relevance(self, u: tuple[Tensor, Tensor], v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from what `users` returns and v [B, C, d]."""
        flat, crossed = u
        pair = torch.cat([crossed[:, None].expand(-1, v.shape[1], -1), v], dim=-1)
        return self.output(self.joined(pair)).squeeze(-1) + self.joint(flat, v)
