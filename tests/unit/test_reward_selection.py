"""Which query a session learns from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray import config
from rgalign_ray.reward.selection import among_first, pairs, resampled, select

REWARD = st.floats(-4, 0, width=32) | st.sampled_from([-1.0, -0.5])
METHODS = ["best", "soft", "random"]
ROW = st.lists(REWARD | st.just(float("nan")), min_size=2, max_size=6)


def choose(rows: list[list[float]], seeds: list[int] | None = None, uplift: float = 1.0, **changes: object) -> list:
    reward = np.array(rows, np.float32)
    numbers = np.array(seeds if seeds is not None else range(len(rows)), np.uint64)
    return select(reward, np.full_like(reward, uplift), config.Select(**changes), numbers).tolist()  # type: ignore[arg-type]


@settings(deadline=None)
@given(row=ROW, margin=st.sampled_from([0.0, 0.3]))
def test_best_takes_the_first_greatest_that_stands_above_the_mean(row: list[float], margin: float) -> None:
    valid = [value for value in row if not np.isnan(value)]
    (chosen,) = choose([row], method="best", margin=margin)
    if len(set(valid)) < 2:
        assert chosen == -1, "alone, or no better than the others"
        return
    gap = max(valid) - float(np.mean(np.array(valid, np.float64)))
    if abs(gap - margin) > 1e-5:
        assert chosen == (row.index(max(valid)) if gap > margin else -1)


@pytest.mark.parametrize("value", [0.7, -0.7, -2.3, 0.1])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_teach_nothing(value: float, count: int, method: str) -> None:
    assert choose([[value] * count], method=method) == [-1]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(REWARD, min_size=3, max_size=3), min_size=1, max_size=5), margin=st.sampled_from([0.0, 0.3])
)
def test_the_same_sessions_teach_whatever_the_method(rows: list[list[float]], margin: float) -> None:
    """Else a control of the choice would be one of the sessions as well."""
    best, soft, random = (np.array(choose(rows, method=method, margin=margin)) >= 0 for method in METHODS)
    assert best.tolist() == soft.tolist() == random.tolist()


def test_margin_is_measured_from_the_sessions_mean() -> None:
    rows = [[-1.0, -3.0], [-1.0, -1.5]]
    assert choose(rows, method="best", margin=0.5) == [0, -1]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_valid_to_choose_among_teaches_nothing(method: str) -> None:
    nan = float("nan")
    assert choose([[nan, nan], [nan, -1.0]], method=method) == [-1, -1]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(REWARD | st.just(float("nan")), min_size=4, max_size=4), min_size=2, max_size=4),
    seed=st.integers(0, 2**63),
    method=st.sampled_from(["soft", "random"]),
)
def test_a_draw_is_valid_and_depends_on_its_own_seed_alone(rows: list[list[float]], seed: int, method: str) -> None:
    seeds = [seed + i for i in range(len(rows))]
    together = choose(rows, seeds, method=method)
    assert together == [choose([row], [own], method=method)[0] for row, own in zip(rows, seeds, strict=True)]
    for row, chosen in zip(rows, together, strict=True):
        valid = {value for value in row if not np.isnan(value)}
        assert len(valid) < 2 if chosen == -1 else not np.isnan(row[chosen])


@settings(deadline=None)
@given(rows=st.lists(st.permutations([-3.0, -2.0, -1.0, float("nan")]), min_size=1, max_size=5))
def test_soft_with_a_tiny_temperature_is_best(rows: list[list[float]]) -> None:
    assert choose(rows, method="soft", beta=1e-6) == choose(rows, method="best")


def test_soft_draws_in_proportion_to_its_weights() -> None:
    beta, values = 0.5, [-1.0, -1.4, float("nan"), -2.0]
    chosen = np.array(choose([values] * 4000, method="soft", beta=beta))
    weights = np.exp(np.array([values[0], values[1], values[3]]) / beta)
    found = [(chosen == place).mean() for place in (0, 1, 3)]
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)


@settings(deadline=None)
@given(row=st.lists(REWARD, min_size=4, max_size=4, unique=True), seed=st.integers(0, 2**63))
def test_random_ignores_the_reward(row: list[float], seed: int) -> None:
    assert choose([row], [seed], method="random") == choose([[-1.0, -2.0, -3.0, -4.0]], [seed], method="random")


def test_random_is_uniform() -> None:
    chosen = np.bincount(choose([[0.0, -50.0, -9.0, -1.0]] * 4000, method="random"), minlength=4)
    np.testing.assert_allclose(chosen / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_without_uplift_a_session_can_be_left_out(method: str) -> None:
    rows = [[-1.0, -2.0]]
    for uplift, taken in ((0.5, True), (0.0, False), (-0.5, False)):
        assert (choose(rows, uplift=uplift, method=method, require_uplift=True)[0] >= 0) == taken
        assert choose(rows, uplift=uplift, method=method)[0] >= 0


def test_the_uplift_of_an_invalid_query_does_not_count() -> None:
    reward = np.array([[-1.0, -2.0, np.nan]])
    uplift = np.array([[-0.1, -1.1, 3.0]])
    assert select(reward, uplift, config.Select(require_uplift=True), np.zeros(1, np.uint64)).tolist() == [-1]


@settings(deadline=None)
@given(row=ROW, gap=st.sampled_from([0.0, 0.3]), rejected=st.sampled_from(["worst", "random", "nearest"]))
def test_a_pair_is_the_best_and_one_that_is_worse(row: list[float], gap: float, rejected: str) -> None:
    reward = np.array([row])
    chosen = config.Select(rejected=rejected, pair_gap=gap)  # type: ignore[arg-type]
    ((best, worse),) = pairs(reward, np.ones_like(reward), chosen, np.array([7], np.uint64)).tolist()
    top = max((value for value in row if not np.isnan(value)), default=np.nan)
    below = [value for value in row if value < top and value <= top - gap]
    if not below:
        assert (best, worse) == (-1, -1)
        return
    assert row[best] == top
    assert row[worse] in below
    if rejected != "random":
        assert row[worse] == (min(below) if rejected == "worst" else max(below))


def test_a_session_that_teaches_no_text_makes_no_pair() -> None:
    reward, numbers = np.array([[-1.0, -1.5]]), np.zeros(1, np.uint64)
    for uplift, changes, made in (
        (1.0, {"margin": 0.2}, True),
        (1.0, {"margin": 0.3}, False),
        (0.0, {}, True),
        (0.0, {"require_uplift": True}, False),
    ):
        chosen = config.Select(**changes)  # type: ignore[arg-type]
        assert (pairs(reward, np.full_like(reward, uplift), chosen, numbers)[0, 0] >= 0) == made


def test_a_random_rejected_query_is_the_sessions_own() -> None:
    reward = np.tile([0.0, -1.0, -2.0, -3.0], (64, 1))
    seeds = np.arange(64, dtype=np.uint64)
    found = pairs(reward, np.ones_like(reward), config.Select(rejected="random"), seeds)
    assert set(found[:, 1].tolist()) == {1, 2, 3}
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(
        pairs(reward, np.ones_like(reward), config.Select(rejected="random"), seeds[order]), found[order]
    )


@settings(deadline=None)
@given(st.lists(st.floats(-1, 3, width=32), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_what_weighs_more_comes_more_often(weights: list[float], seed: int) -> None:
    found = resampled(np.array(weights), seed)
    positive = np.clip(np.array(weights, np.float64), 0, None)
    if positive.sum() <= 0:
        assert not len(found)
        return
    assert len(found) == len(weights) and np.all(np.diff(found) >= 0)
    expected = positive / positive.sum() * len(weights)
    counts = np.bincount(found, minlength=len(weights))
    assert np.all(np.abs(counts - expected) < 1 + 1e-6), "rounded up or down"
    assert not counts[positive == 0].any()


def test_the_best_of_fewer_is_chosen_among_the_first() -> None:
    reward = np.array([[0.1, 0.3, 0.2, 0.9], [np.nan, 0.3, 0.2, 0.1]])
    numbers, settings = np.arange(2, dtype=np.uint64), config.Select()
    found = {n: select(among_first(reward, n), np.ones((2, 4)), settings, numbers).tolist() for n in (None, 2, 3)}
    assert found == {None: [3, 1], 2: [1, -1], 3: [1, 1]}, "one query alone is no choice"
    assert pairs(among_first(reward, 3), np.ones((2, 4)), settings, numbers).tolist() == [[1, 0], [1, 2]]
