"""Is the difference between two rankers more than chance? Users are drawn anew, and so are seeds.

A value is a weighted mean over sessions, sum(w v) / sum(w): weight 1 gives the mean of a per-session
metric, impressions give GAUC by session. Sessions of one user are not independent, therefore users and
not sessions are drawn with replacement. That covers the chance of who was in the test set; the chance
of how training went is covered by a t-interval over paired seeds. A difference is claimed where both
intervals exclude zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 4_000_000
"""Users drawn at once, over repetitions; bounds the memory."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A weighted mean over sessions, averaged over seeds."""

    mean: float
    users: Interval
    """Bootstrap over users."""
    seeds: int
    per_seed: tuple[float, ...]
    over_seeds: Interval | None
    """t-interval over seeds; None where there is one seed."""

    @property
    def separated(self) -> bool:
        """Both intervals exclude zero; with one seed (`seeds` says so) the users' alone decides."""
        intervals = [self.users] if self.over_seeds is None else [self.users, self.over_seeds]
        return all(low > 0 or high < 0 for low, high in intervals)


def bootstrap(
    values: np.ndarray,
    users: Sequence[str] | np.ndarray,
    *,
    weights: np.ndarray | None = None,
    repetitions: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A metric with its intervals.

    Args:
        values: float [seeds, sessions] or [sessions]; nan where a session does not count.
        users: [sessions], whose session it is.
        weights: float [sessions], 1 by default.
        repetitions: of the bootstrap.
        confidence: of both intervals.
        seed: of the draws; equal input and seed give equal intervals.

    Raises:
        ValueError: for unequal lengths, a session that counts under one seed only, or no session that counts.
    """
    values, weights = _checked(values, users, weights)
    per_seed = (values * weights).sum(axis=1) / weights.sum()
    drawn = _draw(values.mean(axis=0, keepdims=True), weights, users, repetitions, seed)[:, 0]
    return _estimate(per_seed, drawn, confidence)


def paired_bootstrap(
    ours: np.ndarray,
    baseline: np.ndarray,
    users: Sequence[str] | np.ndarray,
    *,
    weights: np.ndarray | None = None,
    repetitions: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The difference ours - baseline of a metric, session by session and seed by seed.

    Args and raises: as `bootstrap`; `ours` and `baseline` have one shape, and row s of both belongs to
    the same seed. A session counts where both have a value.
    """
    if np.shape(ours) != np.shape(baseline):
        raise ValueError(f"ours {np.shape(ours)} and baseline {np.shape(baseline)} must have one shape.")
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return bootstrap(difference, users, weights=weights, repetitions=repetitions, confidence=confidence, seed=seed)


def stratified_bootstrap(
    values: Sequence[np.ndarray],
    users: Sequence[Sequence[str]],
    *,
    weights: Sequence[np.ndarray | None],
    repetitions: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """As `bootstrap`, where every seed has sessions and users of its own: users are drawn within each seed.

    Args:
        values: for each seed float [sessions of that seed]; nan where a session does not count.
        users: for each seed, whose session each is.
        weights: for each seed, or None for 1.

    Raises:
        ValueError: for unequal lengths, or a seed in which no session counts.
    """
    per_seed, drawn = [], []
    for number, (value, user, weight) in enumerate(zip(values, users, weights, strict=True)):
        checked, weight = _checked(value, user, weight)
        per_seed.append(float((checked[0] * weight).sum() / weight.sum()))
        drawn.append(_draw(checked, weight, user, repetitions, seed + number)[:, 0])
    return _estimate(np.array(per_seed), np.mean(drawn, axis=0), confidence)


def ratio_bootstrap(
    parts: Sequence[np.ndarray],
    wholes: Sequence[np.ndarray],
    users: Sequence[Sequence[str]],
    *,
    weights: Sequence[np.ndarray | None],
    repetitions: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The mean of `parts` over the mean of `wholes`, both drawn on the same users; as a gain over what could be gained.

    Args and raises: as `stratified_bootstrap`; parts and wholes are parallel, and a session counts where both have
    a value. The interval is of users alone, and it is wide or nan where the whole itself may be zero.
    """
    drawn, means = [], []
    for number, (part, whole, user, weight) in enumerate(zip(parts, wholes, users, weights, strict=True)):
        missing = np.isnan(part) | np.isnan(whole)
        values, weight = _checked(np.where(missing, np.nan, np.stack([part, whole])), user, weight)
        means.append((values * weight).sum(axis=1) / weight.sum())
        drawn.append(_draw(values, weight, user, repetitions, seed + number))
    above, below = np.mean(drawn, axis=0).T
    part, whole = np.mean(means, axis=0)
    per_seed = tuple(float(p / w) for p, w in means)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no whole
        ratios = above / below
    return Estimate(float(part / whole), percentiles(ratios, confidence), len(means), per_seed, None)


def t_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of at least two independent values.

    Raises:
        ValueError: for fewer than two values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two seeds.")
    half = t_quantile(len(values) - 1, confidence) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def t_quantile(freedom: int, confidence: float) -> float:
    """The t for which |T| < t has probability `confidence`, by `freedom` degrees of freedom.

    With t = sqrt(f) tan(a) Student's density becomes cos(a)^(f-1) on (-pi/2, pi/2), which is summed by
    the trapezoidal rule.
    """
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(confidence, below / below[-1], angle))


def _estimate(per_seed: np.ndarray, drawn: np.ndarray, confidence: float) -> Estimate:
    """From the mean of each seed [seeds] and the bootstrap's means over seeds [repetitions]."""
    return Estimate(
        mean=float(per_seed.mean()),
        users=percentiles(drawn, confidence),
        seeds=len(per_seed),
        per_seed=tuple(per_seed.tolist()),
        over_seeds=t_interval(per_seed, confidence) if len(per_seed) > 1 else None,
    )


def _draw(
    values: np.ndarray, weights: np.ndarray, users: Sequence[str] | np.ndarray, repetitions: int, seed: int
) -> np.ndarray:
    """float64 [repetitions, J], weighted means of values [J, S] over users drawn with replacement."""
    keys, user = np.unique(np.asarray(users), return_inverse=True)
    whole = np.bincount(user, weights=weights, minlength=len(keys))
    parts = [np.bincount(user, weights=row * weights, minlength=len(keys)) for row in values]
    sums = np.stack([np.stack(parts, axis=1), np.stack([whole] * len(parts), axis=1)])
    return draw_ratios(sums, repetitions, seed)


def draw_ratios(sums: np.ndarray, repetitions: int, seed: int) -> np.ndarray:
    """Ratios of sums over users drawn with replacement, all J on the same users.

    Args:
        sums: float64 [2, U, J], numerators and denominators by user.

    Returns:
        float64 [repetitions, J]; nan where no user that was drawn has a denominator.
    """
    users = sums.shape[1]
    random = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // users)
    ratios = []
    for start in range(0, repetitions, rows):
        size = min(rows, repetitions - start)
        drawn = random.integers(users, size=(size, users))
        # added row by row: the bits of a matrix product would depend on how many rows are drawn at once
        numerator, denominator = (np.stack([row[drawn].sum(axis=1) for row in part.T], axis=1) for part in sums)
        ratios.append(np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0))
    return np.concatenate(ratios)


def percentiles(drawn: np.ndarray, confidence: float) -> Interval:
    """The middle `confidence` of a bootstrap's draws [repetitions], nan left out."""
    low, high = np.nanpercentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _checked(
    values: np.ndarray, users: Sequence[str] | np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values [seeds, sessions] without nan, and weights [sessions] that are 0 where a session does not count."""
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1] == len(users) == len(weights):
        raise ValueError(f"values {values.shape}, users ({len(users)}) and weights ({len(weights)}) must be parallel.")
    counts = ~np.isnan(values)
    if (counts.any(axis=0) != counts.all(axis=0)).any():
        raise ValueError("a session must count under every seed or under none.")
    weights = np.where(counts.all(axis=0), weights, 0.0)
    if not weights.sum() > 0:
        raise ValueError("no session counts.")
    return np.nan_to_num(values), weights
