"""What choosing among queries is truly worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray import config
from rgalign_ray.evaluate.query_worth import TrueValues, chosen, sentence, summarise

SETTINGS = config.Evaluate(bootstrap=200)


def drawn(
    seed: int, sessions: int = 300, queries: int = 6, agree: float = 0.0
) -> tuple[np.ndarray, TrueValues, TrueValues]:
    """Rewards with invalid ones, true values that follow them as far as `agree` says, and some that do not at all."""
    random = np.random.default_rng(seed)
    reward = random.normal(size=(sessions, queries))
    values = agree * reward + (1 - agree) * random.normal(size=(sessions, queries))
    reward[random.random(reward.shape) < 0.2] = np.nan
    reward[:, :2] = np.nan_to_num(reward[:, :2])  # two valid ones at least
    none = random.normal(size=sessions)
    return reward, TrueValues(values, none), TrueValues(random.normal(size=(sessions, queries)), none)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_no_choice_beats_that_of_the_truth(seed: int, agree: float) -> None:
    found = chosen(*drawn(seed, 20, agree=agree))
    assert (found["truth"] >= found["reward"] - 1e-12).all()
    np.testing.assert_array_equal(found["truth"][:, 0], found["reward"][:, 0], "of one query there is no choice")
    assert (np.diff(found["truth"], axis=1) >= 0).all(), "the best of more is never worse"


def test_a_reward_that_knows_nothing_gains_nothing_however_many_queries_it_has() -> None:
    blind, sees = (summarise(3, [(range(300), chosen(*drawn(0, agree=agree)))], SETTINGS) for agree in (0.0, 0.8))
    low, high = blind.by_reward[-1].low, blind.by_reward[-1].high
    assert low is not None and high is not None and low < 0 < high
    assert sees.by_reward[-1].low is not None and sees.by_reward[-1].low > 0.5
    assert blind.by_truth[-1].value > 1, "there was something to choose"
    low, high = sees.held_out[-1].low, sees.held_out[-1].high
    assert low is not None and high is not None and low < 0 < high, "the other ranker sees nothing in it"
    assert "true CTR@3" in sentence(blind) and "best of 6" in sentence(blind)


def test_values_stand_above_the_mean_of_a_sessions_valid_queries() -> None:
    reward = np.array([[1.0, np.nan, 3.0]])
    values = TrueValues(np.array([[0.2, 9.0, 0.4]]), np.array([0.25]))
    found = chosen(reward, values, TrueValues(np.array([[0.4, 9.0, 0.3]]), np.array([0.0])))
    np.testing.assert_allclose(found["reward"], [[-0.1, 0.1, 0.1]])
    np.testing.assert_allclose(found["held_out"], [[0.05, -0.05, -0.05]])
    np.testing.assert_allclose(found["null"], [-0.05])


def test_seeds_count_alike_whatever_their_sessions() -> None:
    many, few = drawn(1, 400, agree=1.0), drawn(2, 40, agree=0.0)
    both = summarise(3, [(range(400), chosen(*many)), (range(40), chosen(*few))], SETTINGS)
    alone = [chosen(*each)["reward"][:, -1].mean() for each in (many, few)]
    assert both.by_reward[-1].value == pytest.approx(np.mean(alone))
    assert both.sessions == 440
