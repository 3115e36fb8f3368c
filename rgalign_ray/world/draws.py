"""Random numbers that belong to things, not to a sequence.

A draw is a pure function of (seed, what is drawn, whose it is), so that a session is the same whatever
day, chunk or order it is made in. The mixing function is the finaliser of SplitMix64 (Steele, Lea and
Flood, 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib

import numpy as np

from rgalign_ray.hashing import splitmix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Draws of one world."""

    def __init__(self, seed: int):
        self.seed = seed

    def keys(self, name: str, ids: np.ndarray) -> np.ndarray:
        """uint64 of the shape of `ids` (uint64); different ids have different keys."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return splitmix64(splitmix64(ids.astype(np.uint64)) + np.frombuffer(digest, dtype=np.uint64)[0])

    def uniform(self, name: str, ids: np.ndarray, width: int) -> np.ndarray:
        """float64 [*ids.shape, width] in the open interval (0, 1)."""
        slots = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
        bits = splitmix64(self.keys(name, ids)[..., None] + slots)
        return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, name: str, ids: np.ndarray, width: int) -> np.ndarray:
        """float64 [*ids.shape, width], standard normal (Box and Muller)."""
        u = self.uniform(name, ids, 2 * width)
        return np.sqrt(-2.0 * np.log(u[..., :width])) * np.cos(2.0 * np.pi * u[..., width:])


def gumbel(u: np.ndarray) -> np.ndarray:
    """Standard Gumbel variables from uniform ones."""
    return -np.log(-np.log(u))


def pick(u: np.ndarray, shares: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Indices drawn with probabilities `shares` (summing to 1), from uniform variables of any shape."""
    return np.minimum(np.searchsorted(np.cumsum(shares), u, side="right"), len(shares) - 1)


def pick_rows(u: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Indices [n, m] drawn from each row's own weights [n, I] (not normalised), from u [n, m]."""
    cumulative = np.cumsum(weights, axis=1)
    levels = u * cumulative[:, -1:]
    columns = [np.sum(cumulative <= levels[:, i : i + 1], axis=1) for i in range(u.shape[1])]
    return np.minimum(np.stack(columns, axis=1), weights.shape[1] - 1)
