"""One weight, found where it makes what was clicked likeliest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgalign_ray.ranker.group import Group

STEPS = 16
"""Each halves the interval that holds it."""


def likeliest_weight(
    fixed: Tensor, weighed: Tensor, target: Tensor, group: Group, among: tuple[float, float], near: float | None = None
) -> float:
    """w where softmax(fixed + w·weighed) is nearest to `target`, over the sessions of all workers.

    That divergence is convex in w, so its slope tells on which side the least lies: Newton's steps leap to and fro
    where what is weighed tells one candidate from all others.

    Args:
        fixed: [B, C]; -inf where there is no candidate.
        weighed: [B, C], finite where there is one.
        target: the clicks, normalised [B, C].
        among: the least and the most that w may be.
        near: w without any session, and as its prior: normal, of standard deviation one.
    """
    there = fixed > -torch.inf
    fixed, weighed = fixed.double(), weighed.double().masked_fill(~there, 0.0)
    low, high = among
    for _ in range(STEPS):
        weight = (low + high) / 2
        share = (fixed + weight * weighed).softmax(dim=-1)
        slope = group.sum(np.array([float(((share - target) * weighed).sum())]))[0]
        slope += 0.0 if near is None else weight - near
        low, high = (low, weight) if slope >= 0 else (weight, high)
    return (low + high) / 2
