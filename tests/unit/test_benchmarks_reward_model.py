from __future__ import annotations

import numpy as np

from benchmarks.reward_model import one_a_call, random_ranker, unit
from rgalign_ray.reward.judging import query_scores


def test_both_ways_score_the_same_queries() -> None:
    batch, embeddings = unit(3, 2, 40)
    ranker = random_ranker(embeddings)
    at_once, apart = query_scores(ranker, batch, embeddings), one_a_call(ranker, batch, embeddings)
    assert apart.shape == (3, 2, 40)
    np.testing.assert_allclose(at_once[:, :2], apart, atol=1e-5)
    assert np.abs(apart[:, 0] - apart[:, 1]).max() > 1e-3, "queries make a difference"
