"""Zero-shot cosine: how close an intent's text is to the session's, to an encoder that was trained on neither."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments


class Texts(nn.Module):
    """Unit vectors [I, De] of the intents' texts, of the length of a session's embedding."""

    text: Tensor

    def __init__(self, num_intents: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("text", torch.zeros(num_intents, dim))

    def set_text(self, embeddings: np.ndarray) -> None:
        self.text.copy_(F.normalize(torch.from_numpy(embeddings.astype(np.float32)), dim=-1))

    def forward(self, seen: Tensor) -> Tensor:
        return self.text


class Cosine(Ranker):
    """score_i = cos(e(x), e(i)); there is nothing to train, and no base rate is added.

    A session without an embedding scores 0 throughout.
    """

    kind = "cosine"
    reads_queries = True
    trained = False

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.item_tower = Texts(sizes.num_intents, sizes.embedding_dim)

    def fit_queries(self, moments: Moments) -> None:
        """Nothing is fitted to the sessions."""

    def users(self, batch: Batch) -> None:
        """Nothing but the embedding is read of a session."""

    def queries(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """Unit vectors [..., De], zero where `is_null`."""
        if embedding is None:
            return self.item_tower.text.new_zeros(*is_null.shape, self.sizes.embedding_dim)
        readable = embedding.float().masked_fill(is_null[..., None], 0.0)
        return F.normalize(readable, dim=-1)

    def score(self, u: None, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        assert z is not None, "the cosine of a session's embedding needs one"
        v = F.embedding(candidates.clamp(min=0).long(), items)
        if z.dim() == 2:
            return (v @ z[..., None]).squeeze(-1)
        return z @ v.transpose(1, 2)
