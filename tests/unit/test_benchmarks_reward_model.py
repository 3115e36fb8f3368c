from __future__ import annotations

import numpy as np
import torch

from benchmarks.reward_model import SHOP, one_a_call, unit
from rgalign_ray import config
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reward.judging import query_scores


def test_both_ways_score_the_same_queries() -> None:
    torch.manual_seed(0)
    ranker = QERec(SHOP, config.Ranker()).eval()
    for parameter in ranker.parameters():  # gates start at zero, and no query would be read
        torch.nn.init.normal_(parameter, std=0.1)
    batch, embeddings = unit(3, 2, 40)
    at_once, apart = query_scores(ranker, batch, embeddings), one_a_call(ranker, batch, embeddings)
    assert apart.shape == (3, 2, 40)
    np.testing.assert_allclose(at_once[:, :2], apart, atol=1e-4)
    assert np.abs(apart[:, 0] - apart[:, 1]).max() > 1e-2, "queries make a difference"
