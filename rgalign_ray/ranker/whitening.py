"""Whitening: the directions in which frozen vectors differ, each scaled to unit variance.

A language model's last hidden states share a large mean and a few huge directions; a small ranker that
reads them raw learns little else. Statistics are sums, so that workers add theirs and all get the same
directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

FLOOR = 1e-6
"""Directions with less than this share of the largest variance are numerical noise and read as zero."""


@dataclass(frozen=True)
class Moments:
    """Count, sum [D] and sum of outer products [D, D] of vectors, in float64."""

    count: float
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, block: int = 8192) -> Moments:
        """Of vectors [n, D], `block` rows at a time."""
        dim = vectors.shape[1]
        total, outer = np.zeros(dim), np.zeros((dim, dim))
        for start in range(0, len(vectors), block):
            part = vectors[start : start + block].astype(np.float64)
            total += part.sum(axis=0)
            outer += part.T @ part
        return cls(float(len(vectors)), total, outer)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def flat(self) -> np.ndarray:
        """float64 [1 + D + D²], so that workers add theirs in one call."""
        return np.concatenate([[self.count], self.total, self.outer.ravel()])

    @classmethod
    def from_flat(cls, flat: np.ndarray, dim: int) -> Moments:
        """The inverse of `flat`, D being `dim`."""
        return cls(float(flat[0]), flat[1 : dim + 1], flat[dim + 1 :].reshape(dim, dim))


class Whitening(nn.Module):
    """x [..., D] → (x - mean) · components [..., k], of zero mean and unit variance on what it was fitted on.

    Where fewer than k directions carry variance the remaining outputs are zero.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.zeros(dim, k))

    def fit(self, moments: Moments) -> None:
        """Takes mean [D] and components [D, k] from the moments of vectors [n, D]; n below 2 leaves all zero."""
        count = max(moments.count, 1.0)
        mean = moments.total / count
        covariance = moments.outer / count - np.outer(mean, mean)
        values, vectors = torch.linalg.eigh(torch.from_numpy((covariance + covariance.T) / 2))
        k = min(self.components.shape[1], int(moments.count) - 1, len(values))
        if k < 1:
            return
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * largest.sign()  # an eigenvector's sign is arbitrary
        scale = torch.where(values > FLOOR * values[0].clamp(min=1e-12), values.clamp(min=1e-12).rsqrt(), 0.0)
        self.mean.copy_(torch.from_numpy(mean))
        self.components.zero_()
        self.components[:, :k] = vectors * scale

    def recentre(self, moments: Moments) -> None:
        """Takes the mean alone from the moments, if they are of any vector."""
        if moments.count:
            self.mean.copy_(torch.from_numpy(moments.total / moments.count))

    @property
    def steps(self) -> Tensor:
        """[k, D], the moves of x that change one output by one and no other; zero for outputs that are always zero."""
        return (self.components / self.components.square().sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny)).T

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] from x [..., D]."""
        return (x - self.mean) @ self.components
