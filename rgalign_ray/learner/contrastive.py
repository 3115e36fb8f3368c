"""RG-CL: the reasoner's embedding learns to point at the intents that were clicked.

  e ──▶ the ranker's frozen query tower ──▶ z
  InfoNCE of ⟨z, v_i⟩/τ + log base rate_i over the frozen vectors of the whole knowledge base

The base rates stand in the logits so that popularity is already known, and what is left to learn is the
session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rgalign_ray.learner import embedding, frozen
from rgalign_ray.learner.engine import Host, LearnerTask


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Runs RG-CL as `embedding.train` says; its measure is `accuracy`, the share of positives above every
    non-positive.
    """
    return embedding.train(task, host, Contrast)


class Contrast:
    """InfoNCE between a session's query vector and the intents."""

    measure = "accuracy"

    def __init__(self, task: LearnerTask, table: pa.Table) -> None:
        self.rankers = frozen.rankers(task)
        self.clicked: list[list[int]] = table["positives"].to_pylist()
        self.device = task.device

    def __call__(self, embeddings: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        is_null = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=self.device)
        logits = torch.stack([it.query_logits(it.queries(embeddings, is_null)) for it in self.rankers])  # [J, B, P, I]
        positives = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool, device=self.device)
        for number, row in enumerate(rows):
            positives[number, self.clicked[row]] = True
        loss, accuracy = info_nce(logits, positives[:, None].expand(logits.shape))
        return loss.mean(dim=0), accuracy.mean(dim=0)


def info_nce(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE over the whole knowledge base, one term per positive, the other positives masked.

    Args:
        logits: float [..., I].
        positives: bool [..., I], at least one a row.

    Returns:
        loss [...]: -log p of a positive against all non-positives, mean over the row's positives.
        correct [...]: share of the row's positives that stand above every non-positive.
    """
    others = logits.masked_fill(positives, -math.inf)
    log_p = logits - torch.logaddexp(logits, torch.logsumexp(others, dim=-1, keepdim=True))
    count = positives.sum(dim=-1)
    loss = -torch.where(positives, log_p, 0.0).sum(dim=-1) / count
    correct = ((logits > others.amax(dim=-1, keepdim=True)) & positives).sum(dim=-1) / count
    return loss, correct
