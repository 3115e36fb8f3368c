"""Losses summed over sessions, scalars []: divided by the sessions of all workers, uneven shards weigh as they should.

`scores` are [B, C]; `mask` bool [B, C] is true for the candidates that take part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def listnet(scores: Tensor, clicks: Tensor, mask: Tensor) -> Tensor:
    """ListNet, top one (Cao et al. 2007, eq. 5): cross entropy of softmax(scores) against the clicks, normalised.

    `clicks` bool [B, C]; sessions without a click contribute nothing.
    """
    return -log_probability(scores, clicks, mask).sum()


def log_probability(scores: Tensor, clicks: Tensor, mask: Tensor) -> Tensor:
    """[...], mean log-probability (nats) of what was clicked, by softmax of scores [..., C]; 0 where nothing was.

    `clicks` and `mask` are bool, of a shape that broadcasts to that of the scores.
    """
    clicks = clicks & mask
    target = clicks / clicks.sum(dim=-1, keepdim=True).clamp(min=1)
    return (target * masked_log_softmax(scores, mask)).sum(dim=-1)


def pointwise(scores: Tensor, shown: Tensor, clicks: Tensor, mask: Tensor) -> Tensor:
    """Binary cross entropy on what was shown to sessions without a click, averaged over a session's slate.

    `shown` and `clicks` are bool [B, C].
    """
    shown = shown & mask
    sessions = shown.any(dim=-1) & ~(clicks & mask).any(dim=-1)
    slate = shown & sessions[:, None]
    losses = (F.softplus(scores).masked_fill(~slate, 0.0)).sum(dim=-1) / slate.sum(dim=-1).clamp(min=1)
    return losses.sum()


def agreement(teacher: Tensor, student: Tensor, mask: Tensor, is_null: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) per session whose query is not null; no gradient to the teacher.

    Both are logits [B, C]. Sessions where `is_null` [B] contribute nothing.
    """
    target = masked_log_softmax(teacher.detach(), mask)
    difference = target - masked_log_softmax(student, mask)
    losses = (target.exp() * difference).masked_fill(~mask, 0.0).sum(dim=-1).masked_fill(is_null, 0.0)
    return losses.sum()


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """[..., C], log softmax over the candidates of `mask`; zero elsewhere, so that sums need no second mask."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).log_softmax(dim=-1).masked_fill(~mask, 0.0)
