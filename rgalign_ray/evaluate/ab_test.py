"""An A/B test of click-through rates: how many sessions it needs, what it would find, how often it is fooled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rgalign_ray.evaluate.statistics import Interval


def needed_sessions(rate: float, relative_lift: float, *, power: float = 0.8, level: float = 0.05) -> int:
    """Sessions of each arm with which a two-sided two-proportion z-test finds a relative lift of `rate`.

    n = (z_{1−level/2} √(2 p̄ q̄) + z_power √(p q + p' q'))² / (p' − p)² (Fleiss, Levin and Paik, 2003, section 4.2).

    Raises:
        ValueError: for a rate, or one with its lift, outside (0, 1), and for no lift.
    """
    lifted = rate * (1 + relative_lift)
    if not 0 < rate < 1 or not 0 < lifted < 1 or relative_lift == 0:
        raise ValueError(f"rates must lie between 0 and 1 and differ; they are {rate} and {lifted}.")
    mean = (rate + lifted) / 2
    even = math.sqrt(2 * mean * (1 - mean))
    each = math.sqrt(rate * (1 - rate) + lifted * (1 - lifted))
    z = NormalDist().inv_cdf
    return math.ceil(((z(1 - level / 2) * even + z(power) * each) / (lifted - rate)) ** 2)


def z_by_session(clicked: np.ndarray, treated: np.ndarray) -> np.ndarray:
    """z [R] of the two-proportion test with a pooled variance, from outcomes and arms, both bool [R, S].

    Right where sessions are drawn into arms one by one.
    """
    n_b = treated.sum(axis=1)
    n_a = treated.shape[1] - n_b
    in_b = (clicked & treated).sum(axis=1)
    in_a = clicked.sum(axis=1) - in_b
    pooled = clicked.mean(axis=1)
    return (in_b / n_b - in_a / n_a) / np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))


def z_by_user(clicked: np.ndarray, treated: np.ndarray, user: np.ndarray) -> np.ndarray:
    """z [R] where users are drawn into arms: sessions of one user [S] are alike, and their number is random.

    The variance of each arm's ratio of clicks to sessions by linearisation over users (Deng, Knoblich and Lu, 2018).
    """
    rates, variances = [], []
    users = int(user.max()) + 1
    for arm in (~treated, treated):
        sessions, clicks = _by_user(arm, user, users), _by_user(arm & clicked, user, users)
        n, there = sessions.sum(axis=1, keepdims=True), (sessions > 0).sum(axis=1)
        rate = clicks.sum(axis=1, keepdims=True) / n
        spread = (((clicks - rate * sessions) / n) ** 2).sum(axis=1)
        rates.append(rate[:, 0])
        variances.append(spread * there / np.maximum(there - 1, 1))
    return (rates[1] - rates[0]) / np.sqrt(variances[0] + variances[1])


@dataclass(frozen=True)
class ErrorRates:
    """Shares of repetitions in which a test at `level` finds a difference."""

    by_session: float
    """Sessions drawn into arms, two-proportion z."""
    users_by_session: float
    """Users drawn into arms, and the same z, which takes their sessions for independent."""
    by_user: float
    """Users drawn into arms, z over users."""
    repetitions: int


def rejections(
    control: np.ndarray,
    treatment: np.ndarray,
    users: np.ndarray,
    *,
    repetitions: int = 1000,
    level: float = 0.05,
    seed: int = 0,
    at_once: int = 100,
) -> ErrorRates:
    """How often a Bernoulli A/B test over these sessions rejects; with equal arms, how often an A/A test is fooled.

    Args:
        control: float64 [S], P(at least one click) of each session under A.
        treatment: float64 [S], under B.
        users: [S], whose session it is.
        at_once: repetitions held in memory.
    """
    _, user = np.unique(np.asarray(users), return_inverse=True)
    random = np.random.default_rng(seed)
    bound = NormalDist().inv_cdf(1 - level / 2)
    found = np.zeros(3)
    for start in range(0, repetitions, at_once):
        size = (min(at_once, repetitions - start), len(control))
        u = random.random(size)  # the same luck under either way to draw the arms
        one_by_one = random.random(size) < 0.5
        whole = (random.random((size[0], int(user.max()) + 1)) < 0.5)[:, user]
        first, second = (u < np.where(arm, treatment, control) for arm in (one_by_one, whole))
        z = (z_by_session(first, one_by_one), z_by_session(second, whole), z_by_user(second, whole, user))
        found += [(np.abs(values) > bound).sum() for values in z]
    by_session, users_by_session, by_user = (found / repetitions).tolist()
    return ErrorRates(by_session, users_by_session, by_user, repetitions)


def wilson(share: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share of independent trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return middle - half, middle + half


def _by_user(rows: np.ndarray, user: np.ndarray, users: int) -> np.ndarray:
    """int [R, users], counts of bool rows [R, S]."""
    place = user + users * np.arange(len(rows))[:, None]
    return np.bincount(place[rows], minlength=len(rows) * users).reshape(len(rows), users)
