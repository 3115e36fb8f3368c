"""What every ranker is: towers whose vectors are computed once, and a score that joins them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments

Batch = dict[str, Tensor]
"""Sessions as tensors: fields [B, F], multi [B, M, L], history [B, H] and candidates [B, C] as integers
(0 pads multi and history, -1 pads candidates), shown and clicks [B, C] as booleans."""


class Ranker(nn.Module):
    """Scores a session's candidates: score_i = relevance_i + prior_i.

    The log of the base rate is an offset, so that training starts from it and the towers learn what a session
    changes about it; a small log would not teach them the base rate itself.

    Buffers fixed before training starts:
        prior: float32 [I], log share of the training clicks that fell on each intent, one click added to
            each; intents that were never shown get the mean of the others, since nothing is known of them.
        seen: bool [I], intents that training sessions were shown.
    """

    kind: ClassVar[str]
    reads_queries: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    """Whether its item tower takes text embeddings of the intents; else it knows them by id alone."""
    trained: ClassVar[bool] = True
    """Whether it has anything that settings of the training could change."""
    item_tower: nn.Module
    query_tower: nn.Module
    prior: Tensor
    seen: Tensor

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__()
        self.sizes = sizes
        self.settings = settings
        self.register_buffer("prior", torch.zeros(sizes.num_intents))
        self.register_buffer("seen", torch.ones(sizes.num_intents, dtype=torch.bool))

    def users(self, batch: Batch) -> Any:
        """u, what `relevance` reads of a session: [B, d], or whatever else the model joins with a candidate."""
        raise NotImplementedError

    def items(self) -> Tensor:
        """v [I, d], one row per intent of the catalogue."""
        return self.item_tower(self.seen)

    def queries(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """z [..., d] of embeddings [..., De]; the learned null vector where `is_null` [...] or without embeddings."""
        return self.query_tower(embedding, is_null)

    def fit_queries(self, moments: Moments) -> None:
        """Fits what reads embeddings to those of the training sessions, before training starts."""
        self.query_tower.whitening.fit(moments)

    def relevance(self, u: Any, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from u, v [B, C, d] and z [B, d]; [B, N, C] for N queries a session, z [B, N, d].

        z is None for a ranker that reads no queries.
        """
        raise NotImplementedError

    def score(self, u: Any, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        """Scores [B, C], or [B, N, C] for N queries a session, of `candidates` [B, C], rows of `items` [I, d].

        Padding among the candidates scores as row 0 and must be masked afterwards.
        """
        rows = candidates.clamp(min=0).long()
        relevance = self.relevance(u, F.embedding(rows, items), z)
        prior = self.prior[rows]
        return relevance + (prior if relevance.dim() == 2 else prior[:, None])

    def forward(self, batch: Batch, embedding: Tensor | None = None, is_null: Tensor | None = None) -> Tensor:
        """Scores [B, C], -inf where candidates are padded.

        Args:
            batch: at least fields, multi, history and candidates.
            embedding: [B, De]; None reads the null query everywhere.
            is_null: bool [B], sessions that read the null query all the same; None means none of them.
        """
        z = None
        if self.reads_queries:
            if is_null is None:
                is_null = torch.full((len(batch["fields"]),), embedding is None, device=self.prior.device)
            z = self.queries(embedding, is_null)
        scores = self.score(self.users(batch), self.items(), batch["candidates"], z)
        return scores.masked_fill(batch["candidates"] < 0, -torch.inf)
