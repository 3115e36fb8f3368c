from __future__ import annotations

import numpy as np
import pytest

from rgalign_ray.evaluate import ab_test


def test_needed_sessions_at_a_click_rate_of_three_in_ten() -> None:
    assert ab_test.needed_sessions(0.3, 0.0098) == pytest.approx(382_000, rel=0.002)
    assert ab_test.needed_sessions(0.3, 0.0013) == pytest.approx(21_700_000, rel=0.002)
    assert ab_test.needed_sessions(0.3, 0.1) < ab_test.needed_sessions(0.3, 0.1, power=0.9)
    for rate, lift in ((0.0, 0.1), (0.3, 0.0), (0.9, 0.2)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ab_test.needed_sessions(rate, lift)


def test_with_as_many_sessions_as_are_needed_the_test_finds_it_four_times_in_five() -> None:
    arm = ab_test.needed_sessions(0.3, 0.2)
    sessions = 2 * arm
    found = ab_test.rejections(np.full(sessions, 0.3), np.full(sessions, 0.36), np.arange(sessions), repetitions=1500)
    for share in (found.by_session, found.by_user):
        assert share == pytest.approx(0.8, abs=0.035)


def test_an_a_a_test_is_fooled_in_five_percent_unless_it_takes_a_users_sessions_for_independent() -> None:
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 10)
    rate = np.clip(0.3 + 0.25 * random.normal(size=200), 0.02, 0.95)[users]
    found = ab_test.rejections(rate, rate, users, repetitions=2000)
    assert found.by_session == pytest.approx(0.05, abs=0.015)
    assert found.by_user == pytest.approx(0.05, abs=0.015)
    assert found.users_by_session > 0.12


def test_z_by_session_by_hand() -> None:
    clicked = np.array([[1, 1, 0, 0, 1, 0, 0, 0]], dtype=bool)
    treated = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], dtype=bool)
    expected = 0.25 / np.sqrt(3 / 8 * 5 / 8 * 0.5)
    assert ab_test.z_by_session(clicked, treated) == pytest.approx([expected])


def test_users_of_one_session_each_are_sessions() -> None:
    random = np.random.default_rng(1)
    clicked, treated = random.random((20, 4000)) < 0.3, random.random((20, 4000)) < 0.5
    by_user = ab_test.z_by_user(clicked, treated, np.arange(4000))
    assert by_user == pytest.approx(ab_test.z_by_session(clicked, treated), rel=0.01)


def test_wilson_by_hand() -> None:
    assert ab_test.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = ab_test.wilson(0.0, 20)
    assert low == pytest.approx(0.0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-3)
