"""Who may learn from whom: each session's role, from its user and its day."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from rgalign_ray.config import Roles
from rgalign_ray.errors import ConfigError
from rgalign_ray.hashing import hashes

FOLD_SALT = "fold"
"""Of the hash that cuts users into folds, so that it is none of those of roles."""
NONE = "none"
"""Sessions that no role may read, such as those of a test user before the test period."""


def role_names(rounds: int) -> list[str]:
    """Every role of a run of `rounds` rounds, without `none`."""
    return ["rank", *align_roles(rounds), "audit", "valid", "test"]


def is_role(value: object) -> bool:
    """Whether a value is a role of some run, of however many rounds, or `none`."""
    return value in ("rank", "audit", "valid", "test", NONE) or bool(re.fullmatch(r"align_[1-9]\d*", str(value)))


def align_roles(rounds: int) -> list[str]:
    """The roles of the sessions that reasoners are aligned on, one a round."""
    return [f"align_{r}" for r in range(1, rounds + 1)]


def role_of(
    user_ids: Sequence[str] | np.ndarray, ts: np.ndarray, roles: Roles, rounds: int, last_day: np.datetime64
) -> np.ndarray:
    """str [B], the role of each session.

    A user's place in [0, 1) is a hash of its id and `roles.seed`; the roles' shares cut that interval.
    The test period is the last `roles.test_days` days up to `last_day`.

    split `user`: test is the test users inside the test period; every other role ends before it. What
    remains (test users before it, all others inside it) is `none`. With `test_days` 0 the user alone
    decides. split `time`: test is every session inside the test period; before it, users are spread
    over the other roles, whose shares are scaled up to 1.

    Args:
        user_ids: [B]
        ts: datetime64 [B]
        rounds: align is cut evenly into align_1 … align_R.
        last_day: last day of the log.

    Raises:
        ConfigError: for split `time` without a test period.
    """
    if roles.split == "time" and roles.test_days == 0:
        raise ConfigError("roles.test_days: must be above 0 where roles.split is 'time'.")
    days = np.asarray(ts).astype("datetime64[D]")
    in_test_period = days > np.asarray(last_day).astype("datetime64[D]") - np.timedelta64(roles.test_days, "D")
    by_user = _cut(_place(user_ids, roles.seed), roles, rounds)
    if roles.split == "time":
        return np.where(in_test_period, "test", by_user)
    if roles.test_days == 0:
        return by_user
    return np.where((by_user == "test") == in_test_period, by_user, NONE)


def fold_of(user_ids: Sequence[str] | np.ndarray, folds: int) -> np.ndarray:
    """int64 [B], the fold of each user, 0 … folds − 1, whatever the role's share: another hash draws it."""
    return (_place(user_ids, FOLD_SALT) * folds).astype(np.int64)


def _cut(place: np.ndarray, roles: Roles, rounds: int) -> np.ndarray:
    test = 0.0 if roles.split == "time" else roles.test
    shares = np.array([roles.rank, *[roles.align / rounds] * rounds, roles.audit, roles.valid, test])
    names = np.array(role_names(rounds))[shares > 0]
    upper = np.cumsum(shares[shares > 0]) / shares.sum()
    return names[np.searchsorted(upper[:-1], place, side="right")]


def _place(user_ids: Sequence[str] | np.ndarray, salt: int | str) -> np.ndarray:
    """float64 [B] in [0, 1)."""
    users, which = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
    return ((hashes(f"{salt}/{user}" for user in users) >> np.uint64(11)) / 2.0**53)[which]
