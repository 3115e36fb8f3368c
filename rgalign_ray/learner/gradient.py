"""The gradient arm: the ranking loss itself, straight through the frozen ranker into the reasoner.

  e ──▶ query tower ──▶ z ──▶ the whole ranker ──▶ scores ──▶ ListNet against the session's clicks

Nothing is sampled, judged or selected: whatever does so must do better than this. Of several rankers it is the mean
loss. With `reward.resolved_weight` the loss asks for resolved clicks in the same proportion as the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rgalign_ray.learner import embedding
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.learner.frozen import FrozenRankers
from rgalign_ray.ranker.losses import masked_log_softmax


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Runs the gradient arm as `embedding.train` says; its measure is `reward`, the mean log-probability of the
    clicked intents (nats).
    """
    return embedding.train(task, host, RankingLoss)


class RankingLoss:
    """ListNet (top one) of the frozen ranker's scores."""

    measure = "reward"

    def __init__(self, task: LearnerTask, table: pa.Table) -> None:
        self.rankers = FrozenRankers(task)
        assert self.rankers.table["session_id"].equals(table["session_id"]), "both hold the round's sessions, sorted"

    def __call__(self, embeddings: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        batch = self.rankers.batch(rows)
        is_null = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        scores = self.rankers.scores(lambda ranker: ranker.queries(embeddings, is_null), batch)
        exists, labels = batch["candidates"] >= 0, self.rankers.labels.take(np.asarray(rows))

        def reward_of(relevant: np.ndarray) -> Tensor:
            wanted = torch.from_numpy(relevant).to(embeddings.device)
            return torch.stack([log_probability(each, wanted, exists) for each in scores]).mean(dim=0)

        reward = reward_of(labels.clicks)
        if labels.resolved is not None:
            weight = self.rankers.settings.resolved_weight
            reward = (1 - weight) * reward + weight * reward_of(labels.resolved)
        return -reward, reward.detach()


def log_probability(scores: Tensor, relevant: Tensor, exists: Tensor) -> Tensor:
    """[B, N], mean log-probability of the relevant candidates by softmax of scores [B, N, C]: the `logprob` reward.

    `relevant` and `exists` are bool [B, C]; 0 where nothing is relevant.
    """
    relevant = relevant & exists
    target = relevant / relevant.sum(dim=-1, keepdim=True).clamp(min=1)
    return (target[:, None] * masked_log_softmax(scores, exists[:, None].expand(scores.shape))).sum(dim=-1)
