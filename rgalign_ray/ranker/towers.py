"""The three towers: a session's user and context → u, an intent → v, a query embedding → z.

What a softmax cancels has no bias: without a gradient, Adam would turn its float noise into whole steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments, Whitening

EMBEDDING_STD = 0.1
MIN_HEAD = 16
"""Numbers of a field-attention head at least: narrower ones cost three times as much on a CPU's vector units."""
ID_DROPOUT = 0.1
"""Share of intents whose id is hidden in a training step, so that text alone learns to rank."""


class AutoInt(nn.Module):
    """One layer of multi-head self-attention over field tokens [B, T, d], added to them.

    Song et al. 2019, "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural
    Networks", eq. 5 to 7. Instead of its eq. 8, ReLU(attended + W·tokens), a projection that starts at zero
    is added to the tokens as they are: a fresh layer hands them on, so that what the fields say one by one
    is not lost before interactions are learnt.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(heads, 0, -1) if h == 1 or (dim % h == 0 and dim // h >= MIN_HEAD))
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, d] from tokens [B, T, d]."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(self.norm(tokens)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return tokens + self.output(mixed.transpose(1, 2).reshape(batch, length, dim))


class FieldTokens(nn.Module):
    """Every field and every multi-valued field as a token [B, F + M, d]; several values are averaged."""

    def __init__(self, sizes: Sizes, dim: int) -> None:
        super().__init__()
        self.number = sizes.num_fields + sizes.num_multi
        self.field = nn.Embedding(sizes.field_size, dim)
        self.multi = nn.Embedding(max(sizes.multi_size, 1), dim, padding_idx=0) if sizes.num_multi else None
        _normal(self.field)
        if self.multi:
            _normal(self.multi)

    def forward(self, batch: Batch) -> Tensor:
        """[B, F + M, d] from fields [B, F] and multi [B, M, L]."""
        tokens = self.field(batch["fields"])
        if self.multi is None:
            return tokens
        ids = batch["multi"]
        values = self.multi(ids).sum(dim=2)  # padding embeds as zero
        return torch.cat([tokens, values / (ids > 0).sum(dim=2).clamp(min=1)[..., None]], dim=1)


class Events(nn.Module):
    """Event ids [B, H], newest last, 0 = padding → [B, H, d]: an event and its age in places from the newest."""

    def __init__(self, sizes: Sizes, dim: int) -> None:
        super().__init__()
        self.event = nn.Embedding(sizes.history_size, dim, padding_idx=0)
        self.age = nn.Parameter(torch.empty(sizes.history_length, dim))
        _normal(self.event)
        nn.init.normal_(self.age, std=EMBEDDING_STD)

    def forward(self, history: Tensor) -> Tensor:
        """[B, H, d] from event ids [B, H]."""
        return self.event(history) + self.age


class HistoryEncoder(nn.Module):
    """Event ids [B, H] → [B, d] by masked multi-head attention pooling; a session without events reads as zero."""

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__()
        dim = settings.dim
        self.heads = settings.heads
        self.events = Events(sizes, dim)
        self.weight = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, self.heads, bias=False))
        self.value = nn.Linear(dim, dim)

    def forward(self, history: Tensor) -> Tensor:
        """[B, d] from event ids [B, H]."""
        events = self.events(history)
        padding = (history == 0)[..., None]
        weights = self.weight(events).masked_fill(padding, -1e9).softmax(dim=1).masked_fill(padding, 0.0)
        values = self.value(events).unflatten(-1, (self.heads, -1))
        return torch.einsum("bth,bthe->bhe", weights, values).flatten(1)


class TargetAttention(nn.Module):
    """Σ_t a(e_t, v)·e_t over a session's events [B, H, d] for each candidate [B, C, d], with a an MLP: [B, C, d].

    Zhou et al. 2018, "Deep Interest Network for Click-Through Rate Prediction", eq. 3: weights are not
    normalised, so that their sum tells how much of the history concerns the candidate.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.event = nn.Linear(dim, dim)
        self.candidate = nn.Linear(dim, dim, bias=False)
        self.product = nn.Linear(dim, dim, bias=False)
        self.weight = nn.Sequential(nn.PReLU(), nn.Linear(dim, 1))

    def forward(self, events: Tensor, padding: Tensor, v: Tensor) -> Tensor:
        """[B, C, d] from events [B, H, d], bool [B, H] where they are padding, and candidates v [B, C, d]."""
        pairs = self.product(events[:, None] * v[:, :, None])  # [B, C, H, d]
        weights = self.weight(pairs + self.event(events)[:, None] + self.candidate(v)[:, :, None]).squeeze(-1)
        return weights.masked_fill(padding[:, None], 0.0) @ events


class MixtureOfExperts(nn.Module):
    """[B, n] → [B, d]: experts of two layers, weighted by a softmax gate that reads the same input."""

    def __init__(self, size: int, dim: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Linear(size, experts)
        self.hidden = nn.Linear(size, experts * dim)
        self.output = nn.Parameter(torch.empty(experts, dim, dim))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.output, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] from x [B, n]."""
        weights = self.gate(x).softmax(dim=-1)
        hidden = self.dropout(F.relu(self.hidden(x))).unflatten(-1, (self.experts, -1))
        return torch.einsum("be,beh,ehd->bd", weights, hidden, self.output)


class UserTower(nn.Module):
    """Fields, multi-valued fields and history as tokens → AutoInt layers → mixture of experts → u [B, d].

    Args:
        history: the module that turns event ids [B, H] into [B, d]; None means `HistoryEncoder`.
    """

    def __init__(self, sizes: Sizes, settings: config.Ranker, history: nn.Module | None = None) -> None:
        super().__init__()
        dim = settings.dim
        self.fields = FieldTokens(sizes, dim)
        self.history = history or HistoryEncoder(sizes, settings)
        self.interactions = nn.Sequential(*(AutoInt(dim, settings.heads) for _ in range(settings.autoint_layers)))
        self.dropout = nn.Dropout(settings.dropout)
        self.experts = MixtureOfExperts((self.fields.number + 1) * dim, dim, settings.experts, settings.dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, batch: Batch) -> Tensor:
        """u [B, d] from fields [B, F], multi [B, M, L] and history [B, H]."""
        tokens = torch.cat([self.fields(batch), self.history(batch["history"])[:, None]], dim=1)
        return self.norm(self.experts(self.dropout(self.interactions(tokens).flatten(1))))


class Joint(nn.Module):
    """Scores [B, C] by an MLP of what belongs to the session [B, n] and what to each candidate [B, C, m].

    The first layer is linear in both, so that the session's part, which is long, is computed once.
    """

    def __init__(self, session: int, candidate: int, settings: config.Ranker) -> None:
        super().__init__()
        dim = settings.dim
        self.session = nn.Linear(session, 2 * dim)
        self.candidate = nn.Linear(candidate, 2 * dim, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(2 * dim, dim),
            nn.ReLU(),
            nn.Linear(dim, 1),
        )

    def forward(self, session: Tensor, candidate: Tensor) -> Tensor:
        """[B, C] from session [B, n] and candidate [B, C, m]."""
        return self.rest(self.session(session)[:, None] + self.candidate(candidate)).squeeze(-1)


class ItemTower(nn.Module):
    """Intent id ⊕ gate ⊙ projected text embedding → v [I, d], the gate [d] starting at zero.

    A small log cannot tell intents apart by hundreds of numbers; what it learns of them by id must not be
    drowned. The gate opens as far as text ranks better.

    Row 0 of the id table is the unknown intent. It stands in for intents that training never showed,
    so that these are ranked by their text, and in training for a random share of the others, so that
    it means "any intent" when it is needed.

    Args:
        text: False knows intents by their id alone.
    """

    text: Tensor

    def __init__(self, sizes: Sizes, settings: config.Ranker, text: bool = True) -> None:
        super().__init__()
        dim, numbers = settings.dim, sizes.item_dim if text else 0
        self.id = nn.Embedding(sizes.num_intents + 1, dim)
        self.register_buffer("text", torch.zeros(sizes.num_intents, numbers))
        self.projection = nn.Linear(numbers, dim) if numbers else None
        self.gate = nn.Parameter(torch.zeros(dim)) if numbers else None
        self.join = nn.Linear(2 * dim if numbers else dim, dim)
        self.norm = nn.LayerNorm(dim)
        _normal(self.id)

    def set_text(self, embeddings: np.ndarray) -> None:
        """Whitens text embeddings [I, D] of all intents into the frozen table [I, item_dim]."""
        whitening = Whitening(embeddings.shape[1], self.text.shape[1])
        whitening.fit(Moments.of(embeddings))
        self.text.copy_(whitening(torch.from_numpy(embeddings.astype(np.float32))))

    def forward(self, seen: Tensor) -> Tensor:
        """v [I, d] of all intents; bool [I] says which have an id of their own."""
        known = seen
        if self.training:
            known = seen & (torch.rand(len(seen), device=seen.device) >= ID_DROPOUT)
        rows = torch.arange(1, len(seen) + 1, device=seen.device)
        parts = [self.id(torch.where(known, rows, 0))]
        if self.projection is not None:
            parts.append(self.gate * self.projection(self.text))
        return self.norm(self.join(torch.cat(parts, dim=-1)))


class QueryTower(nn.Module):
    """z = null + gate ⊙ projection(whiten(e)), with a gate [d] that starts at zero.

    A fresh tower says `null` whatever it reads, so an uninformative reasoner can do no harm before the
    loss has found a use for it.
    """

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__()
        self.whitening = Whitening(sizes.embedding_dim, min(settings.whitened_dim, sizes.embedding_dim))
        self.projection = nn.Linear(self.whitening.components.shape[1], settings.dim)
        self.gate = nn.Parameter(torch.zeros(settings.dim))
        self.null = nn.Parameter(torch.zeros(settings.dim))

    def forward(self, embedding: Tensor | None, is_null: Tensor) -> Tensor:
        """z [..., d] of embeddings [..., De]; exactly `null` where `is_null` [...], even if the embedding is NaN."""
        if embedding is None:
            return self.null.expand(*is_null.shape, -1).contiguous()  # strides choose kernels, hence bits
        readable = embedding.float().masked_fill(is_null[..., None], 0.0)
        return torch.where(
            is_null[..., None], self.null, self.null + self.gate * self.projection(self.whitening(readable))
        )


def _normal(embedding: nn.Embedding) -> None:
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    if embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].zero_()
