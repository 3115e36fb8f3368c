"""Mutual attention between a session's user vector, a candidate's vector and the query vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MutualAttention(nn.Module):
    """One layer in which three vectors attend to one another: each to the other two, never to itself.

    A softmax over two keys is a sigmoid of the difference of their logits, so a layer needs no [3, 3]
    matrix and no mask: with heads of size e,

        a = sigmoid(q_x · (k_y - k_w) / √e),    x' = norm(x + out(a · val_y + (1 - a) · val_w))

    for each x and its others y, w. User, candidate and query have projections of their own, since they
    come from different towers. Inputs broadcast: what does not depend on the candidate (u and z in the
    first layer) is projected once per session.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, u: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three tensors [..., d] whose leading shapes broadcast against one another → the same three, attended."""
        vectors = (u, v, z)
        projected = [layer(x).chunk(3, dim=-1) for layer, x in zip(self.qkv, vectors, strict=True)]
        attended = []
        for x in range(3):
            y, w = (x + 1) % 3, (x + 2) % 3
            mixed = self._attend(projected[x][0], projected[y], projected[w])
            attended.append(self.norm[x](vectors[x] + self.out[x](mixed)))
        return attended[0], attended[1], attended[2]

    def _attend(self, query: Tensor, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
        _, key_one, value_one = (self._split(part) for part in one)
        _, key_other, value_other = (self._split(part) for part in other)
        heads = self._split(query)
        scale = heads.shape[-1] ** -0.5
        logits = (heads * (key_one - key_other)).sum(dim=-1, keepdim=True)
        weight = torch.sigmoid(scale * logits)
        return (value_other + weight * (value_one - value_other)).flatten(-2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
