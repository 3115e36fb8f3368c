"""Zero-shot cosine: how close an intent's text is to the session's, to an encoder that was trained on neither."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.text_match import GATE_LOGITS, TextMatch, near
from rgalign_ray.ranker.whitening import Moments


class Cosine(Ranker):
    """score_i = cos(e − ē, t_i − t̄), the match alone; there is nothing to train, and no base rate is added.

    A session without an embedding scores 0 throughout.
    """

    kind = "cosine"
    reads_queries = True
    reads_text = False
    trained = False
    match: TextMatch

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.match = TextMatch(sizes, sizes.match_dim)
        self.match.gate.requires_grad_(False).fill_(1 / GATE_LOGITS)

    def items(self) -> Tensor:
        """Coordinates [I, k] of the intents' texts."""
        return self.match.texts

    def users(self, batch: Batch) -> None:
        """Nothing but the embedding is read of a session."""

    def queries(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """Coordinates [..., k], zero where `is_null`."""
        return self.match(embedding, is_null)

    def fit_queries(self, prompt: Moments, query: Moments) -> None:
        """There is no query tower."""

    def score(self, u: None, items: Tensor, candidates: Tensor, z: Tensor | None = None) -> Tensor:
        assert z is not None, "the cosine of a session's embedding needs one"
        return near(z, F.embedding(candidates.clamp(min=0).long(), items))
