"""From judged rollouts to what the reasoner learns from: best of N, soft resampling, the random control, or pairs."""

from __future__ import annotations

import numpy as np

from rgalign_ray import config


def select(reward: np.ndarray, uplift: np.ndarray, settings: config.Select, seeds: np.ndarray) -> np.ndarray:
    """The chosen sample of each session.

    Args:
        reward: float [S, N]; nan for queries that were not valid.
        uplift: float [S, N]; reward above the null query's.
        settings: method, margin, temperature and the uplift filter.
        seeds: uint64 [S]; one per session, so that a draw depends on no order.

    Returns:
        int64 [S]: the sample's number, -1 for a session that teaches nothing. Which sessions teach does not depend on
        the method: what is chosen at random is a control of the choice, not of the sessions.
    """
    chosen = np.full(len(reward), -1, dtype=np.int64)
    for i, values in enumerate(reward):
        if not _teaches(values, uplift[i], settings):
            continue
        valid = np.flatnonzero(np.isfinite(values))
        generator = np.random.Generator(np.random.Philox(int(seeds[i])))
        if settings.method == "random":
            chosen[i] = generator.choice(valid)
        elif settings.method == "soft":
            weights = np.exp((values[valid] - values[valid].max()) / settings.beta)
            chosen[i] = generator.choice(valid, p=weights / weights.sum())
        else:
            chosen[i] = valid[values[valid].argmax()]
    return chosen


def _teaches(reward: np.ndarray, uplift: np.ndarray, settings: config.Select) -> bool:
    """Whether a session with these [N] teaches: not where no reward stands more than the margin above the mean, nor,
    with `require_uplift`, where no query is better than none.
    """
    valid = np.isfinite(reward)
    if not valid.any() or (settings.require_uplift and not (uplift[valid] > 0).any()):
        return False
    # not the maximum less the mean, which rounding moves off 0 where all are equal
    return bool((reward[valid].max() - reward[valid]).mean() > settings.margin)


def among_first(reward: np.ndarray, n: int | None) -> np.ndarray:
    """Rewards [S, N] in which all but a session's first n queries are as if they were not valid; None keeps all."""
    return reward if n is None else np.where(np.arange(reward.shape[1]) < n, reward, np.nan)


def resampled(weights: np.ndarray, seed: int) -> np.ndarray:
    """Places 0 … S − 1 drawn again, S of them, in proportion to weights [S]; negative ones count as zero.

    TRL's SFTTrainer takes no weight per example: what weighs more comes more often. Systematic resampling
    (Kitagawa, 1996): a place comes as often as its share says, rounded up or down.

    Returns:
        int64 [S] in order; empty where no weight is positive.
    """
    positive = np.clip(weights, 0.0, None)
    if not positive.sum() > 0:
        return np.zeros(0, dtype=np.int64)
    count = len(positive)
    places = (np.arange(count) + np.random.Generator(np.random.Philox(seed)).random()) / count
    return np.searchsorted(np.cumsum(positive) / positive.sum(), places, side="right").clip(max=count - 1)


def pairs(reward: np.ndarray, uplift: np.ndarray, settings: config.Select, seeds: np.ndarray) -> np.ndarray:
    """The best sample of each session that teaches, and one that is worse.

    Args:
        reward, uplift: as in `select`.
        settings: which worse one, and how much worse it must be; margin and the uplift filter.
        seeds: uint64 [S].

    Returns:
        int64 [S, 2]: chosen and rejected; -1, -1 for a session without such a pair.
    """
    found = np.full((len(reward), 2), -1, dtype=np.int64)
    for i, values in enumerate(reward):
        if not _teaches(values, uplift[i], settings):
            continue
        best = int(np.nanargmax(values))
        below = np.flatnonzero((values < values[best]) & (values <= values[best] - settings.pair_gap))
        if not len(below):
            continue
        if settings.rejected == "random":
            worse = np.random.Generator(np.random.Philox(int(seeds[i]))).choice(below)
        else:
            worse = below[values[below].argmin() if settings.rejected == "worst" else values[below].argmax()]
        found[i] = best, worse
    return found
