"""What the old ranker showed: slates as Plackett–Luce from its softmax, some of them uniform.

The old ranker knows typed state and popularity, both imperfectly; it reads no text. The logging policy is
the mixture of its slates and uniform ones, and the stored propensity of position k is this mixture's own
P(a_k | a_1 … a_{k−1}), so that the product over positions is the probability of the slate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world.draws import Draws, gumbel
from rgalign_ray.world.needs import SITUATIONS, NeedModel, links
from rgalign_ray.world.parameters import PARAMETERS


@dataclass(frozen=True)
class OldRanker:
    popularity: np.ndarray
    """Logits [I]."""
    known_links: np.ndarray
    """[situations, I]: what a situation adds to the logit."""

    @classmethod
    def draw(cls, draws: Draws, needs: NeedModel) -> OldRanker:
        p = PARAMETERS
        each = np.arange(len(kb.entries()), dtype=np.uint64)
        noise = draws.normal("old popularity", each, 1)[:, 0]
        u = draws.uniform("old links", each, len(SITUATIONS))
        blind = p.old_ranker_blind > u.T
        return cls(
            popularity=p.old_ranker_popularity * needs.popularity + p.old_ranker_noise * noise,
            known_links=links() * ~blind,
        )

    def weights(self, active: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """exp of the logits [n, I]; 0 for intents that are not allowed (bool [I])."""
        pull = PARAMETERS.old_ranker_gain * (active.astype(np.float64) @ self.known_links)
        return np.exp(self.popularity + pull) * allowed


@dataclass(frozen=True)
class Slates:
    shown: np.ndarray
    """Intent indices [n, slate_size], first position first."""
    propensity: np.ndarray
    """[n, slate_size]"""
    uniform: np.ndarray
    """bool [n]: drawn by the uniform arm."""


def draw(draws: Draws, session: np.ndarray, weights: np.ndarray) -> Slates:
    """Slates of sessions (keys uint64 [n]) from the old ranker's weights [n, I]."""
    p = PARAMETERS
    even = (weights > 0).astype(np.float64)
    u = draws.uniform("slate", session, weights.shape[1] + 1)
    uniform = u[:, -1] < p.uniform_share
    with np.errstate(divide="ignore"):
        logits = np.log(np.where(uniform[:, None], even, weights))
    shown = plackett_luce(logits + gumbel(u[:, :-1]), p.slate_size)
    return Slates(shown, mixture_propensity(weights, even, shown, p.uniform_share), uniform)


def plackett_luce(noisy_logits: np.ndarray, size: int) -> np.ndarray:
    """The `size` largest of logits with Gumbel noise, in order: a Plackett–Luce draw (Yellott, 1977)."""
    top = np.argpartition(-noisy_logits, size - 1, axis=1)[:, :size]
    order = np.argsort(-np.take_along_axis(noisy_logits, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)


def conditional(weights: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Plackett–Luce probabilities [n, k] of each position's intent, given the intents before it."""
    chosen = np.take_along_axis(weights, shown, axis=1)
    taken = np.cumsum(chosen, axis=1) - chosen
    return chosen / (weights.sum(axis=1, keepdims=True) - taken)


def mixture_propensity(weights: np.ndarray, even: np.ndarray, shown: np.ndarray, uniform_share: float) -> np.ndarray:
    """P(a_k | a_1 … a_{k−1}) [n, k] under the mixture of both arms."""
    joint = (1.0 - uniform_share) * np.cumprod(conditional(weights, shown), axis=1)
    joint += uniform_share * np.cumprod(conditional(even, shown), axis=1)
    before = np.concatenate([np.ones((len(joint), 1)), joint[:, :-1]], axis=1)
    return joint / before
