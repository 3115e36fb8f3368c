"""What every ranker is: towers whose vectors are computed once, and a score that joins them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.text_match import TextMatch, near
from rgalign_ray.ranker.whitening import Moments

Batch = dict[str, Tensor]
"""Sessions as tensors: fields [B, F], multi [B, M, L], history [B, H] and candidates [B, C] as integers
(0 pads multi and history, -1 pads candidates), shown and clicks [B, C] as booleans."""


class Ranker(nn.Module):
    """Scores a session's candidates: score_i = w·(relevance_i + prior_i), plus ⟨m, t_i⟩ where its text is read.

    The log of the base rate is an offset, so that training starts from it and the towers learn what a session
    changes about it; a small log would not teach them the base rate itself.

    w is one: softmax(score) is then which intent is shown and clicked, what the log has of all candidates. A shop
    should rank by which is clicked if shown, and an old ranker that has read no text chose what was shown: towers that
    have learned from the log imitate it in part, where texts do not. After `rank` w is what they weigh beside the match
    among what was shown.

    Buffers fixed before training starts:
        prior: float32 [I], log share of the training clicks that fell on each intent, one click added to
            each; intents that were never shown get the mean of the others, since nothing is known of them.
        seen: bool [I], intents that training sessions were shown.

    After it ends:
        shown_weight: float32 [1], w among what was shown (`fit.Fit`).
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
    shown_weight: Tensor

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__()
        self.sizes = sizes
        self.settings = settings
        self.register_buffer("prior", torch.zeros(sizes.num_intents))
        self.register_buffer("seen", torch.ones(sizes.num_intents, dtype=torch.bool))
        self.register_buffer("shown_weight", torch.ones(1))
        self.tower_weight = 1.0
        """w"""
        compared = sizes.match_dim if settings.text_match else 0
        self.match = TextMatch(sizes, compared) if self.reads_queries else None

    def users(self, batch: Batch) -> Any:
        """u, what `relevance` reads of a session: [B, d], or whatever else the model joins with a candidate."""
        raise NotImplementedError

    def items(self) -> Tensor:
        """v ⊕ t, [I, d + k], one row per intent of the catalogue; without t for a ranker that compares no texts."""
        v = self.item_tower(self.seen)
        return torch.cat([v, self.match.texts], dim=-1) if self.match else v

    def queries(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """z ⊕ m, [..., d + k] of embeddings [..., De]; the learned null vector and no match where `is_null` [...] or
        without embeddings.
        """
        assert self.match is not None, "of rankers that read queries"
        return torch.cat([self.query_tower(embedding, is_null), self.match(embedding, is_null)], dim=-1)

    def fit_queries(self, prompt: Moments, query: Moments) -> None:
        """Fits what reads embeddings to e(x) and e(x,q) of the training sessions, before training starts."""
        self.query_tower.whitening.fit(prompt + query)

    def relevance(self, u: Any, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from u, v [B, C, d] and z [B, d]; [B, N, C] for N queries a session, z [B, N, d].

        z is None for a ranker that reads no queries.
        """
        raise NotImplementedError

    def score(self, u: Any, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        """Scores [B, C], or [B, N, C] for N queries a session, of `candidates` [B, C], rows of `items` [I, d + k].

        Padding among the candidates scores as row 0 and must be masked afterwards.
        """
        rows = candidates.clamp(min=0).long()
        v, texts = self.parted(F.embedding(rows, items))
        prior = self.prior[rows]
        if z is None:
            return self.tower_weight * (self.relevance(u, v) + prior)
        z, match = self.parted(z)
        relevance = self.relevance(u, v, z)
        relevance = relevance + (prior if relevance.dim() == 2 else prior[:, None])
        return self.tower_weight * relevance + near(match, texts)

    def rank(self) -> None:
        """From here on scores are what to rank by: which intent is clicked if shown, not which is shown and clicked."""
        self.tower_weight = float(self.shown_weight)

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows of `items`, or of queries: what a tower says [..., d] and what texts are compared by [..., k]."""
        return x.tensor_split([x.shape[-1] - (self.match.dim if self.match else 0)], dim=-1)

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
