"""How users click, and which clicks help. Shared by the generator, which draws from it, and the oracle.

Two models over the same attraction of intents, so that what is learned in one world can be tried in the other:

position: every position is looked at with a probability of its own, whatever happens at the others.
cascade:  the user reads from the top (Craswell et al., 2008, "An experimental comparison of click position-bias
          models"), here with more than one click: a click that resolves the need ends the reading, and any other
          step goes on with a stated probability (in the manner of Guo et al., 2009, "Efficient multiple-click
          models in web search").

At the first position, which both look at for certain, they agree.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.parameters import PARAMETERS


class ClickModel(Protocol):
    def draw(
        self, draws: Draws, session: np.ndarray, need: np.ndarray, bias: np.ndarray, shown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """bool [n, k]: clicked, and clicked with the need resolved, of sessions (keys uint64 [n]) shown `shown`."""

    def expected(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P(at least one click) [n], P(a click that resolves) [n]) on intents `ranked` [n, k] from the top."""

    def expected_clicks(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> np.ndarray:
        """Expected number of clicks [n] on intents `ranked` [n, k] from the top."""


class PositionModel:
    """P(click at k) = examination(k) · sigmoid(…) + floor, at most 1, independent of the other positions."""

    def draw(
        self, draws: Draws, session: np.ndarray, need: np.ndarray, bias: np.ndarray, shown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        u = draws.uniform("clicks", session, 2 * shown.shape[1])
        clicked = u[:, : shown.shape[1]] < self.probability(need, bias, shown)
        return clicked, clicked & (u[:, shown.shape[1] :] < resolution_probability(need, shown))

    def expected(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, r = self.probability(need, bias, ranked), resolution_probability(need, ranked)
        return 1.0 - np.prod(1.0 - p, axis=1), 1.0 - np.prod(1.0 - p * r, axis=1)

    def expected_clicks(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> np.ndarray:
        return self.probability(need, bias, ranked).sum(axis=1)

    def probability(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> np.ndarray:
        """P(click) [n, k]."""
        return _attraction(need, bias, ranked, examination(ranked.shape[1]))


class CascadeModel:
    """A user who reads from the top, position by position.

    looked at k: clicks with attraction a_k, a click resolves the need with r_k;
    after a click that resolves she stops, after another she goes on with `goes_on_after_click`,
    after none with `goes_on_after_skip`.
    """

    def draw(
        self, draws: Draws, session: np.ndarray, need: np.ndarray, bias: np.ndarray, shown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        size = shown.shape[1]
        u, goes_on = draws.uniform("clicks", session, 2 * size), draws.uniform("goes on", session, size)
        would_click = u[:, :size] < attraction(need, bias, shown)
        would_resolve = u[:, size:] < resolution_probability(need, shown)
        clicked, resolved = np.zeros(shown.shape, bool), np.zeros(shown.shape, bool)
        looks = np.ones(len(shown), bool)
        for k in range(size):
            clicked[:, k] = looks & would_click[:, k]
            resolved[:, k] = clicked[:, k] & would_resolve[:, k]
            share = np.where(clicked[:, k], PARAMETERS.goes_on_after_click, PARAMETERS.goes_on_after_skip)
            looks = looks & ~resolved[:, k] & (goes_on[:, k] < share)
        return clicked, resolved

    def expected(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, r = attraction(need, bias, ranked), resolution_probability(need, ranked)
        unclicked = _before(np.cumprod((1.0 - a) * PARAMETERS.goes_on_after_skip, axis=1))
        return (unclicked * a).sum(axis=1), (self._looks(a, r) * a * r).sum(axis=1)

    def expected_clicks(self, need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> np.ndarray:
        a, r = attraction(need, bias, ranked), resolution_probability(need, ranked)
        return (self._looks(a, r) * a).sum(axis=1)

    @staticmethod
    def _looks(a: np.ndarray, r: np.ndarray) -> np.ndarray:
        """P(looks at k) [n, k], from attraction and P(resolved | click)."""
        goes_on = a * (1.0 - r) * PARAMETERS.goes_on_after_click + (1.0 - a) * PARAMETERS.goes_on_after_skip
        return _before(np.cumprod(goes_on, axis=1))


MODELS: dict[str, ClickModel] = {"position": PositionModel(), "cascade": CascadeModel()}
"""By `config.World.clicks`."""


def examination(positions: int) -> np.ndarray:
    """[positions]: probability that a position is looked at, 1 / (1 + decay · position)."""
    return 1.0 / (1.0 + PARAMETERS.examination_decay * np.arange(positions))


def attraction(need: np.ndarray, bias: np.ndarray, intents: np.ndarray) -> np.ndarray:
    """P(click | looked at) [n, k]: sigmoid(click_bias + b_user + slope · relevance + bait) + floor, at most 1."""
    return _attraction(need, bias, intents, np.ones(intents.shape[1]))


def _attraction(need: np.ndarray, bias: np.ndarray, intents: np.ndarray, looked_at: np.ndarray) -> np.ndarray:
    """P(click) [n, k] at positions that are looked at with probabilities `looked_at` [k]."""
    p = PARAMETERS
    relevance = kb.relevance()[need[:, None], intents]
    logit = p.click_bias + bias[:, None] + p.relevance_slope * relevance + p.bait * kb.clickbait()[intents]
    return np.minimum(looked_at / (1.0 + np.exp(-logit)) + p.click_floor, 1.0)


def _before(products: np.ndarray) -> np.ndarray:
    """Of running products [n, k] those of the positions above: 1 at the first."""
    return np.concatenate([np.ones((len(products), 1)), products[:, :-1]], axis=1)


def resolution_probability(need: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """P(resolved | click) [n, k]: by relevance alone, so that clickbait does not help."""
    return np.interp(kb.relevance()[need[:, None], ranked], (0.0, kb.NEAR, 1.0), PARAMETERS.resolution)
