"""BST: the candidate as the last event of the history, in a transformer layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.baselines.din import TargetAware, User
from rgalign_ray.ranker.sizes import Sizes


class TargetTransformer(nn.Module):
    """The output at the candidate's place of a transformer layer over events and candidate, [B, C, d].

    Chen et al. 2019, "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", eq. 1 to 4.
    The outputs at the events' places, which the original concatenates as well, would cost H times as much
    for each candidate.
    """

    def __init__(self, settings: config.Ranker) -> None:
        super().__init__()
        dim = settings.dim
        self.heads = settings.heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.feedforward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.LeakyReLU(), nn.Linear(2 * dim, dim))
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, events: Tensor, padding: Tensor, v: Tensor) -> Tensor:
        """[B, C, d] from events [B, H, d], bool [B, H] where they are padding, and candidates v [B, C, d]."""
        query, own_key, own_value = (self._split(part(v)) for part in (self.query, self.key, self.value))
        key, value = self._split(self.key(events)), self._split(self.value(events))  # [B, heads, H, e]
        logits = torch.cat([query @ key.transpose(-1, -2), (query * own_key).sum(-1, keepdim=True)], dim=-1)
        weights = (logits * query.shape[-1] ** -0.5).masked_fill(F.pad(padding, (0, 1))[:, None, None], -torch.inf)
        weights = weights.softmax(dim=-1)  # [B, heads, C, H + 1]; the candidate itself is never padding
        mixed = weights[..., :-1] @ value + weights[..., -1:] * own_value
        attended = self.norms[0](v + self.dropout(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](attended + self.dropout(self.feedforward(attended)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class BST(TargetAware):
    """An MLP of the fields [B, T·d] and of the candidate as the transformer sees it after the events [B, C, d]."""

    kind = "bst"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings, per_candidate=settings.dim)
        self.norm = nn.LayerNorm(settings.dim)  # candidates come normalised from their tower; events must be as long
        self.transformer = TargetTransformer(settings)

    def relevance(self, u: User, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from what `users` returns and v [B, C, d]."""
        fields, events, padding = u
        return self.joint(fields, self.transformer(self.norm(events), padding, v))
