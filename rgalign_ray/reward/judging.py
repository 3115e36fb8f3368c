"""One frozen ranker's word on many latent queries at once: user and item towers run once a session, whatever N."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rgalign_ray import config
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.batches import to_batch
from rgalign_ray.ranker.scoring import LoadedRanker
from rgalign_ray.reward import functions


def judge_queries(
    ranker: LoadedRanker,
    arrays: dict[str, Any],
    labels: functions.Labels,
    embeddings: np.ndarray,
    settings: config.Reward,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards float64 [S, N] of queries whose e(x,q) are float [S, N, H], and [S] of the null query.

    `arrays` of the sessions are as `logs.examples.examples` makes them.
    """
    scores = query_scores(ranker.model, to_batch(arrays), torch.from_numpy(embeddings.astype(np.float32)))
    rewards = functions.reward(settings, scores, labels, functions.asked_of(settings, arrays))
    return rewards[:, :-1], rewards[:, -1]


@torch.inference_mode()
def query_scores(model: Ranker, batch: Batch, embeddings: torch.Tensor) -> np.ndarray:
    """Scores float32 [S, N + 1, C] of N queries a session, and last of the null query.

    User and item towers run once a session, whatever N.

    Args:
        model: a ranker that reads queries.
        batch: the sessions.
        embeddings: float32 [S, N, De].
    """
    sessions, n, _ = embeddings.shape
    is_null = torch.zeros(sessions, n + 1, dtype=torch.bool)
    is_null[:, -1] = True
    z = model.queries(torch.cat([embeddings, torch.zeros_like(embeddings[:, :1])], dim=1), is_null)
    return model.score(model.users(batch), model.items(), batch["candidates"], z).numpy()
