"""Several judges find what they have in common; what one of them is wrong about is nothing to the others."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.judge_ensemble import Judged, worth


def judged(noise: float, sessions: int = 2000, queries: int = 8, judges: int = 4) -> Judged:
    """Rewards are a quality that all share, and each judge's own error; so are values."""
    random = np.random.default_rng(0)
    quality = random.normal(size=(sessions, queries, 1))
    error = noise * random.normal(size=(sessions, queries, judges))
    values = quality + error
    return Judged(["u"] * sessions, values, values - values.mean(axis=1, keepdims=True))


def test_more_judges_choose_better_for_others_than_one_and_worse_for_themselves() -> None:
    its = judged(noise=2.0)
    alone, three = worth(its, 1, 8), worth(its, 3, 8)
    assert three[1].mean() > 1.3 * alone[1].mean()
    assert three[0].mean() < alone[0].mean()
    best = 1.42  # expected maximum of eight standard normal values
    assert alone[1].mean() == pytest.approx(best / np.sqrt(1 + 2.0**2), abs=0.1)


def test_where_judges_agree_their_number_is_nothing() -> None:
    its = judged(noise=0.0)
    for own, others in (worth(its, size, 8) for size in (1, 2, 3)):
        np.testing.assert_allclose(own, others)
        assert others.mean() == pytest.approx(1.42, abs=0.1)
    assert worth(its, 1, 1)[1].mean() == pytest.approx(0.0, abs=0.1), "of one query there is no choice"
