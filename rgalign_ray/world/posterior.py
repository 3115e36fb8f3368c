"""The best anyone could know of a need before it is spoken: Bayes' rule with the world's own laws.

`telling_moments` of a session's moments speak of its need, but nobody is told which: they are younger on average,
and each is about the need with probability `truth`. With r_i(need) the likelihood of moment i as a telling one over
that as another one, m of the telling ones texts, n_t texts and n_e typed events in all, and e_k the elementary
symmetric polynomial of degree k,

    P(moments | need) ∝ Σ_m s^m (1 − s)^(T−m) (n_t − m)! (n_e − T + m)! e_m(r of texts) e_{T−m}(r of typed)

with s = text_share, over the m that leave 1 … `other_texts` texts and 1 … `other_events` typed events for other things.
"""

from __future__ import annotations

from math import factorial

import numpy as np

from rgalign_ray.world import events
from rgalign_ray.world.events import Moments
from rgalign_ray.world.parameters import PARAMETERS


def of_needs(
    prior: np.ndarray,
    moments: Moments,
    plausible: np.ndarray,
    base: np.ndarray,
    text_share: float,
    *,
    reads_texts: bool = True,
) -> np.ndarray:
    """P(need | all that dates from before the entry) [n, I].

    Args:
        prior: weights [n, I] of the needs, given user and state.
        plausible: weights [n, I] of other concerns, for typed events.
        base: weights [I] of other concerns, for texts and for telling moments that miss the need.
        reads_texts: whether what a text is about is known; its kind and age always are.
    """
    telling = PARAMETERS.telling_moments
    texts, typed = _polynomials(moments, plausible, base, reads_texts)
    n_texts = moments.is_text.sum(axis=1)
    n_typed = moments.happened.sum(axis=1) - n_texts
    likelihood = np.zeros_like(prior)
    for m in range(telling + 1):
        share = text_share**m * (1.0 - text_share) ** (telling - m)
        ways = _orders(n_texts - m, PARAMETERS.other_texts) * _orders(n_typed - telling + m, PARAMETERS.other_events)
        likelihood += (share * ways)[:, None] * texts[m] * typed[telling - m]
    weights = prior * likelihood
    return weights / weights.sum(axis=1, keepdims=True)


def _orders(left: np.ndarray, most: int) -> np.ndarray:
    """[n]: left!, 0 where so many moments about other things cannot be."""
    table = np.array([0.0, *(factorial(count) for count in range(1, most + 1))])
    return np.where((left >= 1) & (left <= most), table[left.clip(0, most)], 0.0)


def _polynomials(
    moments: Moments, plausible: np.ndarray, base: np.ndarray, reads_texts: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """e_0 … e_T of the ratios of texts, and of typed events: arrays [n, I]."""
    p = PARAMETERS
    anything = base / base.sum()
    signals = events.signal_probabilities()
    of_anything, of_plausible = anything @ signals, plausible / plausible.sum(axis=1, keepdims=True) @ signals
    age = _density(moments.age, p.telling_age_days) / _density(moments.age, p.other_age_days)
    found = []
    for is_text in (True, False):
        e = [np.ones_like(plausible), *(np.zeros_like(plausible) for _ in range(p.telling_moments))]
        for place in range(moments.kind.shape[1]):
            row = np.flatnonzero(moments.happened[:, place] & (moments.is_text[:, place] == is_text))
            kind, about = moments.kind[row, place], moments.about[row, place]
            if is_text and reads_texts:
                ratio = np.full((len(row), plausible.shape[1]), 1.0 - p.truth)
                with np.errstate(divide="ignore"):  # an intent that cannot occur is no text's subject
                    ratio[np.arange(len(row)), about] += p.truth / anything[about]
            elif is_text:
                ratio = np.ones((len(row), plausible.shape[1]))
            else:
                spoken = p.truth * signals[:, kind].T + (1.0 - p.truth) * of_anything[kind][:, None]
                ratio = spoken / of_plausible[row, kind][:, None]
            ratio *= age[row, place][:, None]
            for degree in range(p.telling_moments, 0, -1):
                e[degree][row] += ratio * e[degree - 1][row]
        found.append(e)
    return found[0], found[1]


def _density(age: np.ndarray, mean: float) -> np.ndarray:
    """Of an exponential age, with the mass beyond each bound on the bound."""
    p = PARAMETERS
    inside = np.exp(-age / mean) / mean
    young, old = 1.0 - np.exp(-p.newest_event_days / mean), np.exp(-p.oldest_event_days / mean)
    return np.where(age <= p.newest_event_days, young, np.where(age >= p.oldest_event_days, old, inside))
