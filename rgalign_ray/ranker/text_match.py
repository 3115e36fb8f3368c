"""What texts say by themselves: how near an intent's is to the session's, where one encoder has read both."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.likeliest import likeliest_weight
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments

GATE_LOGITS = 10.0
"""κ of a gate of one."""
MAX_DIM = 256
"""Directions of the intents' texts that are compared, at most."""
FIT_SESSIONS = 4096
"""To which the first weight is fitted, about: it is one number."""
MAX_WEIGHT = 30.0
"""Of the first weight; where the match alone tells every click, the likeliest is infinite."""


def near(match: Tensor, texts: Tensor) -> Tensor:
    """[B, C] from a session's coordinates [B, k] and its candidates' [B, C, k]; [B, N, C] from [B, N, k]."""
    return (texts @ match[..., None]).squeeze(-1) if match.dim() == 2 else match @ texts.transpose(1, 2)


class TextMatch(nn.Module):
    """κ·cos(e − ē, t_i − t̄), what is added to the score of intent i with text embedding t_i in a session with e.

    ē is the mean over the training sessions and t̄ over the intents: what an encoder says of every session, or of every
    intent, is most of a raw cosine and tells none from another. The way from the mean of the e(x) to that of the e(x,q)
    says as little, and is taken out. It needs no clicks to know which intents a word points at, where the towers must
    learn that intent by intent.

    κ is a weight like others, and begins where base rates and match make the training clicks likeliest: near zero for
    an encoder that says nothing of the intents.

    Both sides are coordinates [..., k], whose product is the match.

    Args:
        dim: k; 0 compares nothing.
    """

    mean: Tensor
    apart: Tensor
    basis: Tensor
    texts: Tensor

    def __init__(self, sizes: Sizes, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(sizes.embedding_dim))
        self.register_buffer("apart", torch.zeros(sizes.embedding_dim))
        self.register_buffer("basis", torch.zeros(sizes.embedding_dim, dim))
        self.register_buffer("texts", torch.zeros(sizes.num_intents, dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def fit(self, items: np.ndarray, prompt: Moments, query: Moments) -> None:
        """Takes the intents' embeddings [I, De], and the moments of the sessions' e(x) and e(x,q).

        Of the intents' differences the k directions that hold most are kept.
        """
        means = [torch.from_numpy(it.total / max(it.count, 1.0)) for it in (prompt, query)]
        self.mean.copy_(means[0])
        if prompt.count and query.count:
            self.apart.copy_(F.normalize(means[1] - means[0], dim=-1))
        texts = torch.from_numpy(items.astype(np.float64))
        texts = self._pointing(texts - texts.mean(dim=0))
        _, _, directions = torch.linalg.svd(texts, full_matrices=False)
        basis = directions[: self.basis.shape[1]].T
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = basis * largest.sign()  # a direction's sign is arbitrary
        self.basis.copy_(basis)
        self.texts.copy_(texts @ basis)

    def fit_weight(self, embedding: Tensor, logits: Tensor, candidates: Tensor, target: Tensor, group: Group) -> None:
        """Begins κ where softmax(logits + κ·cosine) is nearest to `target`.

        Args:
            embedding: e(x) [B, De] of this worker's sessions.
            logits: [B, C], what is known before; -inf where there is no candidate.
            candidates: rows of the intents [B, C].
            target: the clicks, normalised [B, C].
        """
        cosine = (self._cosines(embedding) @ self.texts.T).gather(1, candidates)  # not near(…): [B, C, k] is large
        weight = likeliest_weight(logits, cosine, target, group, (0.0, MAX_WEIGHT))
        with torch.no_grad():
            self.gate.fill_(weight / GATE_LOGITS)

    def forward(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """[..., k] of embeddings [..., De]; zero where `is_null` [...], even if the embedding is NaN."""
        if embedding is None:
            return self.mean.new_zeros(*is_null.shape, self.basis.shape[1])
        readable = torch.where(is_null[..., None], self.mean, embedding.float())
        return self.weight * self._cosines(readable)

    @property
    def weight(self) -> Tensor:
        """κ [1]."""
        return GATE_LOGITS * self.gate

    def _cosines(self, embedding: Tensor) -> Tensor:
        return self._pointing(embedding.float() - self.mean) @ self.basis

    def _pointing(self, x: Tensor) -> Tensor:
        apart = self.apart.to(x.dtype)
        return F.normalize(x - (x @ apart)[..., None] * apart, dim=-1)
