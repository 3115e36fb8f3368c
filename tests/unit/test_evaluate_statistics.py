from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rgalign_ray import metrics
from rgalign_ray.evaluate.statistics import bootstrap, paired_bootstrap, t_interval, t_quantile


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.5, 0.995))
def test_t_quantile_is_scipys(freedom: int, confidence: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-3)


def test_t_interval_by_hand() -> None:
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == (pytest.approx(2 - 4.3027 / 3**0.5, rel=1e-4), pytest.approx(2 + 4.3027 / 3**0.5, rel=1e-4))
    with pytest.raises(ValueError, match="two seeds"):
        t_interval(np.array([1.0]))


def null_difference(random: np.random.Generator, users: int, per_user: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean zero that users share: sessions of one user are alike."""
    user = np.repeat(np.arange(users), per_user)
    return random.normal(size=users)[user] + random.normal(size=len(user)), user


def test_an_a_a_test_is_separated_in_about_five_percent_of_repetitions() -> None:
    random = np.random.default_rng(1)
    false = 0
    for repetition in range(400):
        difference, users = null_difference(random, users=60, per_user=5)
        false += bootstrap(difference, users, repetitions=200, seed=repetition).separated
    assert 0.02 < false / 400 < 0.10


def test_drawing_sessions_instead_of_users_would_claim_far_too_often() -> None:
    random = np.random.default_rng(2)
    false = 0
    for repetition in range(200):
        difference, users = null_difference(random, users=60, per_user=5)
        false += bootstrap(difference, np.arange(len(users)), repetitions=200, seed=repetition).separated
    assert false / 200 > 0.15


def test_a_true_difference_is_found_and_its_interval_holds_it() -> None:
    random = np.random.default_rng(3)
    users = np.repeat(np.arange(200), 4)
    baseline = random.random((3, 800))
    result = paired_bootstrap(baseline + 0.05 + 0.01 * random.normal(size=(3, 800)), baseline, users)
    assert result.separated
    assert result.seeds == 3
    assert result.users[0] < 0.05 < result.users[1]
    assert result.mean == pytest.approx(0.05, abs=0.003)


def test_seeds_that_disagree_leave_a_difference_unseparated() -> None:
    users = np.arange(500)
    ours = np.stack([np.full(500, 0.3), np.full(500, -0.1), np.full(500, 0.0)])
    result = paired_bootstrap(ours, np.zeros((3, 500)), users)
    assert result.users[0] > 0, "over users alone it would look sure"
    assert not result.separated


def test_one_seed_says_so() -> None:
    result = bootstrap(np.ones(20), np.arange(20))
    assert result.seeds == 1
    assert result.over_seeds is None
    assert result.separated


def test_with_impressions_as_weights_the_mean_is_gauc() -> None:
    random = np.random.default_rng(4)
    session = np.repeat(np.arange(80), random.integers(2, 9, 80))
    scores, labels = random.random(len(session)), random.random(len(session)) < 0.4
    result = metrics.group_auc(scores, labels, session)
    estimate = bootstrap(result.auc, result.groups % 20, weights=result.weight)
    assert estimate.mean == pytest.approx(metrics.gauc(scores, labels, session))
    assert estimate.users[0] < estimate.mean < estimate.users[1]


def test_sessions_without_a_value_do_not_count() -> None:
    values, users = np.array([1.0, np.nan, 3.0]), np.array(["a", "b", "c"])
    assert bootstrap(values, users).mean == 2.0
    assert paired_bootstrap(values, np.zeros(3), users).mean == 2.0


def test_equal_input_and_seed_give_equal_intervals_whatever_the_memory(monkeypatch) -> None:
    values, users = np.random.default_rng(5).random((2, 300)), np.arange(300) // 3
    first = bootstrap(values, users, seed=7)
    monkeypatch.setattr("rgalign_ray.evaluate.statistics.DRAWS_AT_ONCE", 1000)
    assert bootstrap(values, users, seed=7) == first
    assert bootstrap(values, users, seed=8) != first


@pytest.mark.parametrize(
    ("values", "users", "weights"),
    [
        (np.ones(3), np.arange(2), None),
        (np.ones(3), np.arange(3), np.ones(2)),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), np.arange(2), None),
        (np.full(3, np.nan), np.arange(3), None),
        (np.ones((2, 2, 2)), np.arange(2), None),
    ],
    ids=["users short", "weights short", "counts under one seed only", "nothing counts", "three dimensions"],
)
def test_refuses(values, users, weights) -> None:
    with pytest.raises(ValueError, match=r"parallel|every seed|no session counts"):
        bootstrap(values, users, weights=weights)


def test_pairs_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(np.ones((2, 3)), np.ones((1, 3)), np.arange(3))
