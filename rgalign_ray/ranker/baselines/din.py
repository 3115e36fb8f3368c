"""DIN: the history read anew for every candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.towers import Events, FieldTokens, ItemTower, Joint, QueryTower, TargetAttention

User = tuple[Tensor, Tensor, Tensor]
"""Fields [B, T·d], events [B, H, d] and where events are padding [B, H]."""


class TargetAware(Ranker):
    """What rankers share that read the history anew for every candidate; `per_candidate` numbers join the fields."""

    def __init__(self, sizes: Sizes, settings: config.Ranker, per_candidate: int) -> None:
        super().__init__(sizes, settings)
        self.fields = FieldTokens(sizes, settings.dim)
        self.events = Events(sizes, settings.dim)
        self.item_tower = ItemTower(sizes, settings, text=self.reads_text)
        self.joint = Joint(self.fields.number * settings.dim, per_candidate, settings)
        self.dropout = nn.Dropout(settings.dropout)

    def users(self, batch: Batch) -> User:
        """Fields [B, T·d], events [B, H, d], and bool [B, H] where these are padding."""
        fields = self.dropout(self.fields(batch).flatten(1))
        return fields, self.events(batch["history"]), batch["history"] == 0


class DIN(TargetAware):
    """An MLP of the fields [B, T·d], the candidate and the history as target attention reads it, both [B, C, d]."""

    kind = "din"
    reads_text = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings, per_candidate=(4 if self.reads_queries else 3) * settings.dim)
        self.attention = TargetAttention(settings.dim)

    def relevance(self, u: User, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from what `users` returns, v [B, C, d] and, where queries are read, z [B, d]."""
        fields, events, padding = u
        interest = self.attention(events, padding, v)
        parts = [interest, v, interest * v]
        if z is not None:
            parts.append(z[:, None] * v)
        return self.joint(fields, torch.cat(parts, dim=-1))


class DINText(DIN):
    """DIN that knows intents by their text as well."""

    kind = "din_text"
    reads_text = True


class DINSentence(DINText):
    """DIN that also reads an embedding [De] of the session's text, through QE-Rec's query tower.

    With embeddings of a sentence encoder it is what an engineer would try before any LLM.
    """

    kind = "din_sentence"
    reads_queries = True

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.query_tower = QueryTower(sizes, settings)
