"""Off-policy evaluation: what a new, stochastic policy would have earned, from slates that another policy showed.

The value of policy π is the mean over the log's sessions (users being drawn at random) of the expected reward of
one slate drawn by π, with as many slots as were logged. The reward is a sum over positions:

    clicks      r_k = 1[click at k]            value = expected clicks per slate
    any click   r_k = 1[first click at k]      value = P(at least one click), the project's CTR@K

A log stores the conditional propensity μ_k = μ(a_k | a_1 … a_{k−1}, x) of every slot, whose product over slots
is the probability of the slate. Which weight w_k of the reward at position k is unbiased depends on what that
reward may depend on:

    slate           Π_{j≤K} π_j / μ_j      anything in the slate
    prefix          Π_{j≤k} π_j / μ_j      the items at and above k (McInerney et al., 2020, reward interaction IPS)
    item-position   π(a_k at k) / μ(a_k at k)     the item and its position alone (Li et al., 2018)

The first two need nothing but the stored propensities. The third has by far the smallest weights, but needs the
logging policy's *marginal* probability of (item, position), which the conditional ones of the logged slates do not
give: an item is logged where its propensity happens to be high, so averages of logged propensities are biased by
size. They must come from the logging policy itself (`plackett_luce.marginals` of its scores). Nor does 'any click'
have an item-position estimate: which click is the first depends on what stands above it.

Doubly robust (Kiyohara et al., 2022, cascade doubly robust): the direct value of a model q_k(x, a) of the reward at
a position plus weighted residuals,

    Σ_k Σ_a π(a at k) q_k(a) + Σ_k w_k (r_k − q_k(a_k)).

For a model that knows item and position alone, the expected later rewards in their recursion cancel, and this is
what is left. It is unbiased wherever w is, whatever q; q is fitted on other users than it is used for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from rgalign_ray.errors import DataError
from rgalign_ray.evaluate import plackett_luce
from rgalign_ray.evaluate.statistics import Interval, draw_ratios, percentiles

Reward = Literal["clicks", "any click"]

PRIOR_CLICKS = 3.0
"""Expected clicks after which the reward model trusts an item's own rate as much as the position's."""


@dataclass(frozen=True)
class LoggedSlates:
    """S sessions of a log, each with up to C candidates and a slate of up to K slots.

    Raises:
        DataError: for a propensity of a shown slot outside (0, 1], or a reward in an empty slot.
        ValueError: for arrays of other shapes.
    """

    candidates: np.ndarray
    """int [S, C], intent indices, −1 where padded."""
    shown: np.ndarray
    """int [S, K], columns of `candidates` from the first position on, −1 in empty slots."""
    propensity: np.ndarray
    """float [S, K], P(a_k | a_1 … a_{k−1}) under the logging policy; not read in empty slots."""
    clicks: np.ndarray
    """bool or 0/1 [S, K]."""
    users: Sequence[str] | np.ndarray
    """[S], whose session it is."""
    marginal: np.ndarray | None = None
    """float [S, K], P(a_k stands at k) under the logging policy, where it is known."""

    def __post_init__(self) -> None:
        size = self.shown.shape
        if (
            not len(self.candidates) == len(self.users) == size[0]
            or not size == self.propensity.shape == self.clicks.shape
        ):
            raise ValueError(
                f"candidates {self.candidates.shape} and users ({len(self.users)}) must have as many rows as shown "
                f"{size}, and propensity {self.propensity.shape} and clicks {self.clicks.shape} its shape."
            )
        if self.marginal is not None and self.marginal.shape != size:
            raise ValueError(f"marginal {self.marginal.shape} must have the shape of shown {size}.")
        for name, values in (("propensity", self.propensity), ("marginal propensity", self.marginal)):
            if values is not None and (wrong := self.filled & ~((values > 0) & (values <= 1 + 1e-6))).any():
                row, position = np.argwhere(wrong)[0]
                raise DataError(
                    f"{name}: {values[row, position]} at position {position} of row {row}; what was shown must have "
                    "a probability above 0 and at most 1."
                )
        if (np.asarray(self.clicks, dtype=bool) & ~self.filled).any():
            raise DataError("clicks: a click in a slot where nothing was shown.")

    @property
    def filled(self) -> np.ndarray:
        """bool [S, K]"""
        return self.shown >= 0

    @property
    def mask(self) -> np.ndarray:
        """bool [S, C]"""
        return self.candidates >= 0

    def rewards(self, reward: Reward) -> np.ndarray:
        """float64 [S, K]"""
        clicks = np.asarray(self.clicks, dtype=np.float64)
        if reward == "clicks":
            return clicks
        return clicks * (np.cumsum(clicks, axis=1) == 1)

    def of_shown(self, values: np.ndarray) -> np.ndarray:
        """[S, K]: of values by candidate and position [S, C, K] those of the slots; 0 in empty ones."""
        taken = np.take_along_axis(values, np.maximum(self.shown, 0)[:, None, :], axis=1)[:, 0, :]
        return np.where(self.filled, taken, 0.0)


@dataclass(frozen=True)
class Terms:
    """An estimator as a sum of ratios: Σ_j (Σ_s numerator_sj / Σ_s denominator_sj)."""

    numerator: np.ndarray
    """float64 [S, J]"""
    denominator: np.ndarray
    """float64 [S, J]"""
    weights: np.ndarray
    """float64 [S, K], for the effective sample size."""

    @property
    def value(self) -> float:
        return float((self.numerator.sum(axis=0) / self.denominator.sum(axis=0)).sum())


@dataclass(frozen=True)
class Estimate:
    """A policy's estimated value."""

    estimator: str
    value: float
    standard_error: float
    """Of users drawn at random; linearised where the weights are normalised."""
    normal: Interval
    bootstrap: Interval
    """Percentiles, over users drawn with replacement."""
    effective_sessions: float
    """(Σ w)² / Σ w² at the position where that is smallest; the sessions that an equal weighting would need."""
    largest_weight: float


def prefix_weights(log: LoggedSlates, logits: np.ndarray) -> np.ndarray:
    """float64 [S, K]: Π_{j≤k} π_j / μ_j of a Plackett–Luce policy with these logits [S, C]."""
    propensity = np.where(log.filled, log.propensity, 1.0)
    return np.cumprod(plackett_luce.conditional(logits, log.shown) / propensity, axis=1)


def item_position_weights(log: LoggedSlates, marginals: np.ndarray) -> np.ndarray:
    """float64 [S, K]: π(a_k at k) / μ(a_k at k), 1 in empty slots, of a policy with these marginals [S, C, K].

    Raises:
        DataError: when the log does not hold the logging policy's own marginal propensities.
    """
    if log.marginal is None:
        raise DataError(
            "item-position weights need the logging policy's marginal propensities; averages of logged propensities "
            "are biased by size. Without the logging policy's scores use the prefix weights."
        )
    return np.where(log.filled, log.of_shown(marginals) / np.where(log.filled, log.marginal, 1.0), 1.0)


def ips(weights: np.ndarray, rewards: np.ndarray) -> Terms:
    """Importance sampling: the mean of Σ_k w_k r_k (both [S, K])."""
    return _mean((weights * rewards).sum(axis=1), weights)


def clipped(weights: np.ndarray, rewards: np.ndarray, most: float) -> Terms:
    """Importance sampling with weights cut at `most` (Ionides, 2008): biased downwards, with a bounded variance."""
    return ips(np.minimum(weights, most), rewards)


def self_normalised(weights: np.ndarray, rewards: np.ndarray) -> Terms:
    """Σ_k (Σ_s w_sk r_sk / Σ_s w_sk) (Swaminathan and Joachims, 2015): the weights of a position have mean 1."""
    return Terms(weights * rewards, weights, weights)


def doubly_robust(log: LoggedSlates, weights: np.ndarray, rewards: np.ndarray, q: np.ndarray, pi: np.ndarray) -> Terms:
    """The direct value of a reward model q [S, C, K] under marginals π [S, C, K], plus its weighted residuals."""
    residual = np.where(log.filled, rewards - log.of_shown(q), 0.0)
    return _mean((pi * q).sum(axis=(1, 2)) + (weights * residual).sum(axis=1), weights)


def direct(q: np.ndarray, pi: np.ndarray) -> Terms:
    """What the reward model alone says: as biased as the model is."""
    return _mean((pi * q).sum(axis=(1, 2)), np.ones((len(q), 1)))


def reward_table(log: LoggedSlates, rewards: np.ndarray, *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """q float64 [S, C, K]: a position's mean reward times an item's rate relative to its positions', shrunk to 1.

    The rows of a user come from a table fitted on the users of other folds.
    """
    _, user = np.unique(np.asarray(log.users), return_inverse=True)
    fold = np.random.default_rng(seed).permutation(user.max() + 1)[user] % folds
    item = np.take_along_axis(log.candidates, np.maximum(log.shown, 0), axis=1)
    q = np.zeros((*log.candidates.shape, rewards.shape[1]))
    for number in range(folds):
        rows = fold == number
        used = log.filled & ~rows[:, None]
        by_position = rewards.sum(axis=0, where=used) / np.maximum(used.sum(axis=0), 1)
        expected = np.bincount(item[used], np.broadcast_to(by_position, used.shape)[used], log.candidates.max() + 1)
        found = np.bincount(item[used], rewards[used], log.candidates.max() + 1)
        relative = (found + PRIOR_CLICKS) / (expected + PRIOR_CLICKS)
        q[rows] = relative[np.maximum(log.candidates[rows], 0), None] * by_position
    return np.where(log.mask[:, :, None], q, 0.0)


def terms(
    log: LoggedSlates,
    logits: np.ndarray,
    reward: Reward,
    *,
    clip: float | None = None,
    marginals: np.ndarray | None = None,
) -> dict[str, Terms]:
    """Every estimator that the log and the reward allow, by name.

    Args:
        logits: float64 [S, C] of the Plackett–Luce policy, from `plackett_luce.logits`.
        clip: the largest weight of the clipped ones; √S by default (Ionides, 2008).
        marginals: float64 [S, C, K] of these logits, where they are at hand.

    The item-position ones are there for clicks alone, and where the log holds marginal propensities. What needs
    the target's own marginals is left out where `plackett_luce.has_marginals` says no.
    """
    rewards = log.rewards(reward)
    most = math.sqrt(len(rewards)) if clip is None else clip
    prefix = prefix_weights(log, logits)
    slate = np.repeat(prefix[:, -1:], rewards.shape[1], axis=1)
    found = {
        "prefix IPS": ips(prefix, rewards),
        "prefix IPS, clipped": clipped(prefix, rewards, most),
        "prefix SNIPS": self_normalised(prefix, rewards),
        "slate IPS": ips(slate, rewards),
    }
    if not plackett_luce.has_marginals(logits.shape[1], rewards.shape[1]):
        return found
    pi = plackett_luce.marginals(logits, rewards.shape[1]) if marginals is None else marginals
    q = reward_table(log, rewards)
    found |= {"cascade DR": doubly_robust(log, prefix, rewards, q, pi), "direct": direct(q, pi)}
    if reward == "any click" or log.marginal is None:
        return found
    own = item_position_weights(log, pi)
    return found | {
        "item-position IPS": ips(own, rewards),
        "item-position IPS, clipped": clipped(own, rewards, most),
        "item-position SNIPS": self_normalised(own, rewards),
        "item-position DR": doubly_robust(log, own, rewards, q, pi),
    }


def on_policy(log: LoggedSlates, reward: Reward) -> Terms:
    """The logging policy's own mean reward."""
    rewards = log.rewards(reward)
    return ips(np.ones_like(rewards), rewards)


def estimate(
    named: dict[str, Terms],
    users: Sequence[str] | np.ndarray,
    *,
    repetitions: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Estimate]:
    """Values with their intervals; all estimators meet the same bootstrap draws.

    Raises:
        ValueError: for fewer than two users.
    """
    keys, user = np.unique(np.asarray(users), return_inverse=True)
    if len(keys) < 2:
        raise ValueError("an interval over users needs at least two users.")
    sums = [
        np.stack([_by_user(part, user, len(keys)) for part in (it.numerator, it.denominator)]) for it in named.values()
    ]
    drawn = draw_ratios(np.concatenate(sums, axis=-1), repetitions, seed)
    edges = np.cumsum([part.shape[-1] for part in sums])[:-1]
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = []
    for (name, it), part, ratios in zip(named.items(), sums, np.split(drawn, edges, axis=1), strict=True):
        error = _standard_error(*part)
        found.append(
            Estimate(
                estimator=name,
                value=it.value,
                standard_error=error,
                normal=(it.value - z * error, it.value + z * error),
                bootstrap=percentiles(ratios.sum(axis=1), confidence),
                effective_sessions=effective_sample_size(it.weights),
                largest_weight=float(it.weights.max()),
            )
        )
    return found


def effective_sample_size(weights: np.ndarray) -> float:
    """(Σ w)² / Σ w² of weights [S, K], at the position where it is smallest (Kish, 1965)."""
    squared = np.maximum((weights**2).sum(axis=0), np.finfo(np.float64).tiny)
    return float((weights.sum(axis=0) ** 2 / squared).min())


def _mean(numerator: np.ndarray, weights: np.ndarray) -> Terms:
    return Terms(numerator[:, None], np.ones((len(numerator), 1)), weights)


def _by_user(values: np.ndarray, user: np.ndarray, users: int) -> np.ndarray:
    """float64 [users, J], the sums of values [S, J]."""
    return np.stack([np.bincount(user, weights=column, minlength=users) for column in values.T], axis=1)


def _standard_error(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Of Σ_j ratio_j, linearised, from sums by user [U, J]; users are independent, their sessions are not."""
    whole = denominator.sum(axis=0)
    ratio = numerator.sum(axis=0) / whole
    influence = ((numerator - ratio * denominator) / whole).sum(axis=1)
    return math.sqrt((influence**2).sum() * len(influence) / (len(influence) - 1))
