from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from rgalign_ray.world import exposure
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.parameters import PARAMETERS

WEIGHTS = np.array([4.0, 0.5, 2.0, 1.0, 0.25])
SLATES = np.array(list(permutations(range(len(WEIGHTS)), 3)))


def brute_force(slate: np.ndarray) -> float:
    """Probability of a slate: a mixture of drawing without replacement by weight and uniformly."""
    by_weight, even, left = 1.0, 1.0, list(range(len(WEIGHTS)))
    for intent in slate:
        by_weight *= WEIGHTS[intent] / WEIGHTS[left].sum()
        even /= len(left)
        left.remove(intent)
    return (1 - PARAMETERS.uniform_share) * by_weight + PARAMETERS.uniform_share * even


def propensity(slates: np.ndarray) -> np.ndarray:
    weights = np.tile(WEIGHTS, (len(slates), 1))
    return exposure.mixture_propensity(weights, np.ones_like(weights), slates, PARAMETERS.uniform_share)


def test_the_propensities_of_all_slates_sum_to_one_and_equal_brute_force():
    found = propensity(SLATES)
    assert np.all((found > 0) & (found <= 1))
    assert found.prod(axis=1).sum() == pytest.approx(1.0)
    assert found.prod(axis=1) == pytest.approx([brute_force(slate) for slate in SLATES])
    assert propensity(SLATES[[0]])[0, 0] == pytest.approx(brute_force_first(SLATES[0, 0]))


def brute_force_first(intent: int) -> float:
    return sum(brute_force(slate) for slate in SLATES if slate[0] == intent)


def test_slates_are_drawn_with_their_propensities():
    n = 40_000
    drawn = exposure.draw(Draws(0), np.arange(n, dtype=np.uint64), np.tile(WEIGHTS, (n, 1)))
    code = drawn.shown @ [25, 5, 1]
    expected = propensity(SLATES).prod(axis=1)
    share = np.array([(code == slate @ [25, 5, 1]).mean() for slate in SLATES])
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / n)
    assert drawn.propensity == pytest.approx(propensity(drawn.shown))
    assert drawn.uniform.mean() == pytest.approx(PARAMETERS.uniform_share, abs=0.005)


def test_intents_that_are_not_allowed_are_never_shown():
    weights = np.tile(WEIGHTS * [1, 0, 1, 1, 1], (2000, 1))
    drawn = exposure.draw(Draws(0), np.arange(2000, dtype=np.uint64), weights)
    assert not np.any(drawn.shown == 1)
    assert np.all(drawn.propensity > 0)
