"""The gradient arm: the ranking loss itself, straight through the frozen ranker into the reasoner.

  e ──▶ query tower ──▶ z ──▶ the whole ranker ──▶ scores ──▶ ListNet against the session's clicks

Nothing is sampled, judged or selected: whatever does so must do better than this. Of several rankers it is the mean
loss; with `gradient.through: match` it goes back through the match of texts alone. With `reward.resolved_weight` it
asks for resolved clicks in the same proportion as the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.learner import embedding
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.learner.frozen import FrozenRankers
from rgalign_ray.ranker.losses import log_probability
from rgalign_ray.ranker.qe_rec import QERec


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Runs the gradient arm as `embedding.train` says; its measure is `reward`, the mean log-probability of the
    clicked intents (nats).
    """
    return embedding.train(task, host, RankingLoss)


class RankingLoss:
    """ListNet (top one) of the frozen ranker's scores.

    Raises:
        DataError: where it shall go through the match of texts, and a ranker has none.
    """

    measure = "reward"

    def __init__(self, task: LearnerTask, table: pa.Table) -> None:
        assert isinstance(task.optimisation, config.Gradient)
        self.through = task.optimisation.through
        self.rankers = FrozenRankers(task)
        if self.through == "match" and not all(ranker.match and ranker.match.dim for ranker in self.rankers.models):
            raise DataError(
                "gradient.through: the ranker compares no texts; set it to all, or ranker.text_match to true."
            )
        assert self.rankers.table["session_id"].equals(table["session_id"]), "both hold the round's sessions, sorted"

    def __call__(self, embeddings: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        part = self.rankers.part(rows)
        is_null = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)

        def read(ranker: QERec) -> Tensor:
            z, match = ranker.parted(ranker.queries(embeddings, is_null))
            return torch.cat([z.detach() if self.through == "match" else z, match], dim=-1)

        scores, labels = self.rankers.scores(read, part.batch), part.labels
        asked = torch.from_numpy(part.asked).to(embeddings.device)

        def reward_of(relevant: np.ndarray) -> Tensor:
            wanted = torch.from_numpy(relevant).to(embeddings.device)
            return torch.stack([log_probability(each, wanted[:, None], asked[:, None]) for each in scores]).mean(dim=0)

        reward = reward_of(labels.clicks)
        if labels.resolved is not None:
            weight = self.rankers.settings.resolved_weight
            reward = (1 - weight) * reward + weight * reward_of(labels.resolved)
        return -reward, reward.detach()
