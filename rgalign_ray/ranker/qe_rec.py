"""QE-Rec: a query-enhanced ranker, in which user, candidate and latent query attend to one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.mutual_attention import MutualAttention
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.text_match import near
from rgalign_ray.ranker.towers import Events, ItemTower, QueryTower, TargetAttention, UserTower

User = tuple[Tensor, Tensor, Tensor]
"""The user tower's vector [B, d], events [B, H, d] and where events are padding [B, H]."""


class Head(nn.Module):
    """The score of a candidate from the three attended vectors and the products u⊙v, z⊙v.

    An MLP over all five, beside a linear reading of the products that starts as ⟨u, v⟩/√d + ⟨z, v⟩/√d:
    training sets out from the two-tower model, and the attention adds to it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attended = nn.Linear(3 * dim, dim)
        self.products = nn.Linear(2 * dim, dim, bias=False)
        self.output = nn.Linear(dim, 1, bias=False)
        self.linear = nn.Linear(2 * dim, 1)
        nn.init.constant_(self.linear.weight, dim**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, attended: Tensor, products: Tensor) -> Tensor:
        """[...] from the attended vectors [..., 3·d] and the products [..., 2·d]."""
        return (self._fused(attended, products) + self.linear(products)).squeeze(-1)

    def parts(self, attended: Tensor, products: Tensor) -> Tensor:
        """[..., 3], whose sum is the score: the linear reading of u⊙v, that of z⊙v, and what all five say together."""
        dim = products.shape[-1] // 2
        weight = self.linear.weight[0]
        pairs = [products[..., :dim] @ weight[:dim], products[..., dim:] @ weight[dim:]]
        return torch.stack([*pairs, self._fused(attended, products).squeeze(-1) + self.linear.bias], dim=-1)

    def _fused(self, attended: Tensor, products: Tensor) -> Tensor:
        return self.output(torch.relu(self.attended(attended) + self.products(products)))


class QERec(Ranker):
    """The ranker that reads query embeddings.

    What stands for the user beside a candidate is u + Σ_t a(e_t, v_i)·e_t: the tower's vector, and the history as
    DIN's attention reads it for that very candidate. A vector made before the candidate is known blurs events that
    point straight at an intent.

    ⟨z, v_i⟩/τ + ⟨m, t_i⟩ + prior_i is the query tower's own opinion: with the base rate added, what is left for the
    vector to say is what distinguishes the session.
    """

    kind = "qe_rec"
    reads_queries = True

    def __init__(self, sizes: Sizes, settings: config.Ranker) -> None:
        super().__init__(sizes, settings)
        self.user_tower = UserTower(sizes, settings)
        self.events = Events(sizes, settings.dim)
        self.interest = TargetAttention(settings.dim)
        self.item_tower = ItemTower(sizes, settings)
        self.query_tower = QueryTower(sizes, settings)
        self.layers = nn.ModuleList(
            MutualAttention(settings.dim, settings.heads) for _ in range(settings.attention_layers)
        )
        self.head = Head(settings.dim)

    def users(self, batch: Batch) -> User:
        history = batch["history"]
        return self.user_tower(batch), self.events(history), history == 0

    def relevance(self, u: User, v: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, C] from v [B, C, d] and z [B, d]; [B, N, C] from z [B, N, d]."""
        scores = self.head(*self._joined(u, v, z))
        return scores[:, 0] if z is not None and z.dim() == 2 else scores

    def parts(self, u: User, items: Tensor, candidates: Tensor, z: Tensor) -> Tensor:
        """[B, C, 4], whose sum is `score` of the same: base rate, user and item, query and item (with the match of
        their texts), and all fused.
        """
        rows = candidates.clamp(min=0).long()
        (v, texts), (z, match) = self.parted(F.embedding(rows, items)), self.parted(z)
        by_user, by_query, fused = (self.tower_weight * self.head.parts(*self._joined(u, v, z))[:, 0]).unbind(dim=-1)
        prior = self.tower_weight * self.prior[rows]
        return torch.stack([prior, by_user, by_query + near(match, texts), fused], dim=-1)

    def _joined(self, u: User, v: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the head reads: attended vectors [B, N, C, 3·d], and products [B, N, C, 2·d]; N is 1 for z [B, d]."""
        assert z is not None, "QE-Rec reads a query vector; the null query has one too"
        user, events, padding = u
        wide_u = (user[:, None] + self.interest(events, padding, v))[:, None]  # [B, 1, C, d]
        wide_v = v[:, None]  # [B, 1, C, d]
        wide_z = (z[:, None] if z.dim() == 2 else z)[:, :, None]  # [B, N, 1, d]
        attended: tuple[Tensor, Tensor, Tensor] = (wide_u, wide_v, wide_z)
        for layer in self.layers:
            attended = layer(*attended)
        products = torch.cat(torch.broadcast_tensors(wide_u * wide_v, wide_z * wide_v), dim=-1)
        return torch.cat(torch.broadcast_tensors(*attended), dim=-1), products

    def query_logits(self, z: Tensor, items: Tensor | None = None) -> Tensor:
        """⟨z, v_i⟩/τ + prior_i + ⟨m, t_i⟩ for every intent, [..., I] from z ⊕ m [..., d + k]; `items` [I, d + k], where
        already computed.
        """
        (v, texts), (z, match) = self.parted(self.items() if items is None else items), self.parted(z)
        return z @ v.T / self.settings.tau + self.prior + match @ texts.T

    def user_logits(self, u: User, items: Tensor) -> Tensor:
        """The user tower's ranking in the same form: ⟨u, v_i⟩/τ + prior_i, [B, I]."""
        return u[0] @ self.parted(items)[0].T / self.settings.tau + self.prior
