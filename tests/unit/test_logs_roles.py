from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.config import Roles
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.roles import NONE, fold_of, role_names, role_of

LAST = np.datetime64("2026-02-11")
USERS = np.array([f"user-{i}" for i in range(4000)])


def shares(draw_total: list[int]) -> Roles:
    whole = sum(draw_total)
    rank, align, audit, valid, test = (part / whole for part in draw_total)
    return Roles(rank=rank, align=align, audit=audit, valid=valid, test=test)


roles_configs = st.lists(st.integers(0, 10), min_size=5, max_size=5).filter(sum).map(shares)


@settings(deadline=None, max_examples=30)
@given(roles_configs, st.integers(1, 4), st.integers(0, 3), st.integers(0, 9))
def test_roles_are_disjoint_by_user_and_near_their_shares(
    config: Roles, rounds: int, seed: int, test_days: int
) -> None:
    config = config.model_copy(update={"seed": seed, "test_days": test_days})
    users, before = np.repeat(USERS, 2), LAST - np.timedelta64(40, "D")
    ts = np.tile([before, LAST], len(USERS)).astype("datetime64[us]")
    role = role_of(users, ts, config, rounds, LAST)
    by_user = [{r for r in pair if r != NONE} for pair in role.reshape(-1, 2)]
    assert all(len(found) <= 1 for found in by_user), "a user has one role"
    expected = {"rank": config.rank, "audit": config.audit, "valid": config.valid, "test": config.test}
    expected |= {f"align_{r}": config.align / rounds for r in range(1, rounds + 1)}
    assert set(expected) == set(role_names(rounds))
    for name, share in expected.items():
        found = np.mean([name in names for names in by_user])
        assert found == pytest.approx(share, abs=0.04)
        assert found == 0 or share > 0


@settings(deadline=None)
@given(st.integers(0, 5))
def test_only_test_users_stand_in_the_test_period_and_only_there(seed: int) -> None:
    config = Roles(seed=seed)
    days = np.arange(LAST - np.timedelta64(13, "D"), LAST + np.timedelta64(1, "D"))
    for day in days:
        role = role_of(USERS, np.full(len(USERS), day), config, 1, LAST)
        inside = day > LAST - np.timedelta64(config.test_days, "D")
        assert set(role) == ({"test", NONE} if inside else {"rank", "align_1", "valid", NONE})


def test_the_test_period_is_the_last_days_to_the_day() -> None:
    first_test_day = np.datetime64("2026-02-05T00:00:00", "us")
    tester = USERS[role_of(USERS, np.full(len(USERS), LAST), Roles(), 1, LAST) == "test"][:1]
    assert role_of(tester, np.array([first_test_day]), Roles(), 1, LAST) == "test"
    assert role_of(tester, first_test_day[None] - np.timedelta64(1, "us"), Roles(), 1, LAST) == NONE


def test_without_test_days_the_user_alone_decides() -> None:
    early, late = (np.full(len(USERS), day) for day in (np.datetime64("2020-01-01"), LAST))
    config = Roles(test_days=0)
    assert (role_of(USERS, early, config, 2, LAST) == role_of(USERS, late, config, 2, LAST)).all()
    assert NONE not in role_of(USERS, late, config, 2, LAST)


def test_split_time_tests_on_every_session_of_the_test_period() -> None:
    config = Roles(split="time")
    assert set(role_of(USERS, np.full(len(USERS), LAST), config, 1, LAST)) == {"test"}
    before = role_of(USERS, np.full(len(USERS), LAST - np.timedelta64(7, "D")), config, 1, LAST)
    assert set(before) == {"rank", "align_1", "valid"}
    assert np.mean(before == "rank") == pytest.approx(0.60 / 0.85, abs=0.03)
    with pytest.raises(ConfigError, match="test_days"):
        role_of(USERS, np.full(len(USERS), LAST), Roles(split="time", test_days=0), 1, LAST)


def test_a_users_place_is_fixed_for_ever() -> None:
    """A change of the hash would move users of running logs between roles."""
    days = np.full(6, np.datetime64("2026-01-01"))
    roles = role_of(["a", "b", "c", "d", "e", "f"], days, Roles(test_days=0), 1, LAST)
    assert roles.tolist() == ["rank", "rank", "align_1", "rank", "rank", "test"]


def test_another_seed_is_another_draw() -> None:
    ts = np.full(len(USERS), np.datetime64("2026-01-01"))
    first, second = (role_of(USERS, ts, Roles(seed=seed, test_days=0), 1, LAST) for seed in (0, 1))
    assert np.mean(first == second) == pytest.approx(0.6**2 + 0.15**2 + 0.1**2 + 0.15**2, abs=0.04)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_even_stable_and_none_of_the_roles(folds: int) -> None:
    fold = fold_of(USERS, folds)
    np.testing.assert_array_equal(fold[::-1], fold_of(USERS[::-1], folds), "a user's fold depends on no order")
    role = role_of(USERS, np.full(len(USERS), LAST), Roles(test_days=0), 1, LAST)
    for name in ("rank", "valid"):
        counts = np.bincount(fold[role == name], minlength=folds)
        assert len(counts) == folds
        np.testing.assert_allclose(counts, (role == name).sum() / folds, rtol=0.25)
