"""SASRec's encoder of the history in the two-tower model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgalign_ray import config
from rgalign_ray.ranker.baselines.two_tower import TwoTower
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.towers import Events, UserTower

LAYERS = 2


class CausalHistory(nn.Module):
    """Event ids [B, H], newest last → the state [B, d] of the newest event; zero for a session without events.

    Kang and McAuley 2018, "Self-Attentive Sequential Recommendation": each event attends to itself and to
    earlier ones.
    """

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__()
        dim = settings.dim
        self.heads = settings.heads
        self.events = Events(sizes, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, self.heads, dim, settings.dropout, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, history: Tensor) -> Tensor:
        """[B, d] from event ids [B, H]."""
        padding = history == 0
        length = history.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=history.device).triu(1)
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        hidden = (later | padding[:, None, :]) & ~itself  # padding sees itself: a softmax over nothing is nan
        states = self.events(history)
        for layer in self.layers:
            states = layer(states, src_mask=hidden.repeat_interleave(self.heads, dim=0))
        return states[:, -1].masked_fill(padding[:, -1:], 0.0)


class SASRec(TwoTower):
    """The two-tower model with `CausalHistory` instead of attention pooling, and intents by id alone."""

    kind = "sasrec"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.user_tower = UserTower(sizes, settings, CausalHistory(sizes, settings))
