"""Reinforcement learning on the embedding itself: no query is decoded.

  w = whiten(e)      copies w + σ·ε_k      reward r_k of each, from the frozen ranker      advantage r_k − mean r
  loss = −mean_k advantage_k · log N(w + σ·ε_k ; w, σ²), the copies and advantages held fixed

In the manner of Zhang et al. 2025, "Reinforced Latent Reasoning for LLM-based Recommendation". The noise is drawn
in the directions that the ranker reads, in units of their deviation between sessions; elsewhere it could
change no reward. Advantages are not divided by their deviation: where all copies rank alike, that would
blow up rounding errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rgalign_ray import config
from rgalign_ray.learner import embedding
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.learner.frozen import FrozenRankers


def train(task: LearnerTask, host: Host) -> dict[str, Any]:
    """Runs it as `embedding.train` says; its measure is `reward`, the mean reward of the copies."""
    return embedding.train(task, host, NoisyCopies)


class NoisyCopies:
    """The policy is a normal distribution around the whitened embedding; any reward will do."""

    measure = "reward"

    def __init__(self, task: LearnerTask, table: pa.Table) -> None:
        assert isinstance(task.optimisation, config.Latent)
        self.rankers = FrozenRankers(task)
        assert self.rankers.table["session_id"].equals(table["session_id"]), "both hold the round's sessions, sorted"
        self.settings, self.seed = task.optimisation, task.seed

    def __call__(self, embeddings: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        # every ranker of a judge has the same whitening, which follows from what it has read alone
        whitening = self.rankers.models[0].query_tower.whitening
        centre = whitening(embeddings)[:, :, None]  # [B, P, 1, k]
        noise = self._noise(rows, step, centre)  # [B, P, K, k]
        copies = (embeddings.detach()[:, :, None] + self.settings.noise * noise @ whitening.steps).flatten(1, 2)
        is_null = torch.zeros(copies.shape[:-1], dtype=torch.bool, device=copies.device)
        rewards = self.rankers.rewards(lambda ranker: ranker.queries(copies, is_null), rows).view(noise.shape[:-1])
        rewards = rewards.nan_to_num(0.0)  # where a session has nothing that the reward asks for, nothing is learned
        advantage = rewards - rewards.mean(dim=-1, keepdim=True)
        distance = (centre.detach() + self.settings.noise * noise - centre).square().sum(dim=-1)
        loss = (advantage * distance).mean(dim=-1) / (2 * self.settings.noise**2)
        return loss, rewards.mean(dim=-1)

    def _noise(self, rows: Sequence[int], step: int, centre: Tensor) -> Tensor:
        """Drawn by session and step, so that it depends on no batch and no worker."""
        shape = (centre.shape[1], self.settings.copies, centre.shape[-1])
        drawn = [np.random.Generator(np.random.Philox(key=[self.seed, row << 32 | step])) for row in rows]
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in drawn])).to(centre.device)
