"""How users click, and which clicks help. Shared by the generator, which draws from it, and the oracle."""

from __future__ import annotations

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world.parameters import PARAMETERS


def examination(positions: int) -> np.ndarray:
    """[positions]: probability that a position is looked at, 1 / (1 + decay · position)."""
    return 1.0 / (1.0 + PARAMETERS.examination_decay * np.arange(positions))


def click_probability(need: np.ndarray, bias: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """P(click) [n, k] on intents `ranked` [n, k] at positions 0 … k−1, independent given the user.

    examination(position) · sigmoid(click_bias + b_user + slope · relevance + bait) + floor, at most 1.
    """
    p = PARAMETERS
    relevance = kb.relevance()[need[:, None], ranked]
    logit = p.click_bias + bias[:, None] + p.relevance_slope * relevance + p.bait * kb.clickbait()[ranked]
    return np.minimum(examination(ranked.shape[1]) / (1.0 + np.exp(-logit)) + p.click_floor, 1.0)


def resolution_probability(need: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """P(resolved | click) [n, k]: by relevance alone, so that clickbait does not help."""
    return np.interp(kb.relevance()[need[:, None], ranked], (0.0, kb.NEAR, 1.0), PARAMETERS.resolution)
