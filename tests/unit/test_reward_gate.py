"""The gate tells a reward from noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.errors import DataError
from rgalign_ray.reward.gate import Gate, gate


def judges(seed: int, sessions: int, queries: int, shared: float, invalid: float = 0.0) -> np.ndarray:
    """Rewards [S, N, 2] of two judges whose within-session correlation is `shared`, at levels of their own."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(sessions, queries, 1))
    own = random.normal(size=(sessions, queries, 2))
    level = 5 * random.normal(size=(sessions, 1, 2))
    rewards = math.sqrt(shared) * common + math.sqrt(1 - shared) * own + level
    return np.where(random.random((sessions, queries, 1)) < invalid, np.nan, rewards)


def gated(judged: np.ndarray, audited: np.ndarray | None = None) -> Gate:
    """Of sessions of users of their own."""
    return gate(judged, [str(session) for session in range(len(judged))], audited)


def test_independent_judges_agree_on_nothing() -> None:
    result = gated(judges(0, 2000, 4, shared=0.0, invalid=0.1))
    assert abs(result.reliability) < 0.04
    assert abs(result.agreement) < 3 * result.agreement_error
    assert result.noise == pytest.approx(result.spread, rel=0.05), "all that the reward tells is noise"
    assert result.best_of_n[-1] > 0.9
    assert abs(result.best_of_n_judged[-1]) < 0.05, "choosing by noise gains nothing in another judge's eyes"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(0, 0.5))
def test_identical_judges_agree_on_everything(seed: int, queries: int, invalid: float) -> None:
    first = judges(seed, 20, queries, shared=0.5, invalid=invalid)[..., :1]
    first[0] = np.arange(queries)[:, None]  # one session at least is usable
    other_level = first + np.random.default_rng(seed).normal(size=(20, 1, 1))
    result = gated(np.concatenate([first, other_level], axis=-1))
    assert result.reliability == pytest.approx(1.0)
    assert result.noise == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(result.best_of_n_judged, result.best_of_n, atol=1e-9)
    assert result.agreement == pytest.approx(result.best_of_n[-1])


@pytest.mark.parametrize("shared", [0.3, 0.8])
def test_reliability_is_the_correlation_within_sessions(shared: float) -> None:
    result = gated(judges(1, 4000, 4, shared))
    assert result.reliability == pytest.approx(shared, abs=0.03)
    assert result.spread == pytest.approx(0.92, abs=0.03)  # mean sd of 4 standard normals: c4(4) = 0.9213
    assert result.noise == pytest.approx(0.9213 * math.sqrt(1 - shared), abs=0.03)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(0, 0.6))
def test_the_best_of_more_queries_is_never_worse(seed: int, queries: int, invalid: float) -> None:
    rewards = judges(seed, 15, queries, shared=0.5, invalid=invalid)
    usable = np.isfinite(rewards[..., 0]).sum(axis=1) >= 2
    if not usable.any():
        with pytest.raises(DataError, match="no session has two valid queries"):
            gated(rewards)
        return
    result = gated(rewards)
    assert len(result.best_of_n) == len(result.best_of_n_judged) == queries
    assert (np.diff(result.best_of_n) >= 0).all()
    chosen = rewards[usable][..., 0]
    expected = np.nanmax(chosen, axis=1) - np.nanmean(chosen, axis=1)
    assert result.best_of_n[-1] == pytest.approx(expected.mean())
    assert result.sessions == usable.sum() == len(result.spread_by_session) == len(result.noise_by_session)


def test_an_auditor_that_can_judge_nothing_says_nothing() -> None:
    judged = judges(0, 5, 4, shared=0.5)
    result = gated(judged, np.full(judged.shape[:2], np.nan))
    assert result.audit is None and result.best_of_n_audited is None


def test_figures_by_hand() -> None:
    nan = np.nan
    first = [[1.0, 3.0, nan], [0.0, nan, nan], [5.0, 2.0, 2.0]]
    second = [[0.0, 4.0, nan], [9.0, nan, nan], [1.0, 1.0, 4.0]]
    result = gated(np.stack([first, second], axis=-1))
    assert result.sessions == 2, "a session with one valid query compares nothing"
    assert result.spread_by_session == pytest.approx([math.sqrt(2), math.sqrt(3)])
    # differences of the centred rewards: (1, -1) and (3, 0, -3)
    assert result.noise_by_session == pytest.approx([1.0, 3.0 / math.sqrt(2)])
    # centred: (-1, 1), (2, -1, -1) and (-2, 2), (-1, -1, 2)
    assert result.reliability == pytest.approx((4 - 2 + 1 - 2) / math.sqrt(8 * 14))
    assert result.best_of_n == pytest.approx([(-1 + 2) / 2, (1 + 2) / 2, (1 + 2) / 2])
    assert result.best_of_n_judged == pytest.approx([(-2 - 1) / 2, (2 - 1) / 2, (2 - 1) / 2])
    assert result.agreement == pytest.approx(0.5)
    assert result.agreement_error == pytest.approx(np.std([2, -1], ddof=1) / math.sqrt(2))


def test_sessions_of_one_user_do_not_make_the_error_smaller() -> None:
    rewards = judges(6, 40, 3, shared=0.5, invalid=0.1)
    again = np.repeat(rewards, 5, axis=0)
    users = [str(user) for user in range(40) for _ in range(5)]
    once, five_times = gated(rewards), gate(again, users)
    assert five_times.agreement == pytest.approx(once.agreement)
    assert five_times.agreement_error == pytest.approx(once.agreement_error)
    assert math.isnan(gate(again[:5], users[:5]).agreement_error), "one user says nothing of others"


def test_a_reward_that_never_differs_is_unreliable_and_not_nan() -> None:
    result = gated(np.ones((3, 4, 2)))
    assert (result.spread, result.noise, result.reliability) == (0.0, 0.0, 0.0)


def test_further_judges_change_nothing() -> None:
    rewards = judges(2, 30, 3, shared=0.5)
    assert gated(np.concatenate([rewards, rewards[..., :1] * 7], axis=-1)) == gated(rewards)


def test_the_auditor_sees_what_the_judges_share_and_not_their_errors() -> None:
    judged = judges(3, 4000, 4, shared=0.5, invalid=0.1)
    common = judged.mean(axis=-1)
    own_error = judged[..., 0] - judged[..., 1]
    sees, blind = gated(judged, common), gated(judged, np.random.default_rng(4).normal(size=own_error.shape))
    assert sees.audit == pytest.approx(math.sqrt(0.75), abs=0.03)
    assert blind.audit == pytest.approx(0.0, abs=0.03)
    assert sees.best_of_n_audited is not None and blind.best_of_n_audited is not None
    assert sees.best_of_n_audited[-1] > 0.6 and np.all(np.diff(sees.best_of_n_audited) > 0)
    assert abs(blind.best_of_n_audited[-1]) < 0.05
    assert gated(judged).audit is None


def test_sessions_that_the_auditor_cannot_judge_spoil_nothing() -> None:
    judged = judges(5, 2000, 4, shared=0.5)
    common = judged.mean(axis=-1)
    partly = np.where(np.arange(2000)[:, None] % 3 == 0, np.nan, common)
    some, rest = gated(judged, partly), gated(judged[np.arange(2000) % 3 > 0], common[np.arange(2000) % 3 > 0])
    assert (some.audit, some.best_of_n_audited) == (rest.audit, rest.best_of_n_audited)
    assert some.sessions == 2000
