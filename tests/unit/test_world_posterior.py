"""What can be known of a need: right by brute force, and honest on average."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.world import events, posterior
from rgalign_ray.world.generate import Entries, Shop
from rgalign_ray.world.parameters import PARAMETERS

SHARES = [0.0, 0.5, 1.0]


def entries(text_share: float, count: int) -> Entries:
    world = config.World(sessions=3 * count, users=2 * count, days=2, seed=3, text_share=text_share)
    return Shop(world, test_days=1).entries(0, 0, count)


def known(e: Entries, text_share: float, reads_texts: bool = True) -> np.ndarray:
    return posterior.of_needs(e.prior, e.moments, e.plausible, e.base, text_share, reads_texts=reads_texts)


def by_hand(e: Entries, row: int, text_share: float) -> np.ndarray:
    """P(need | x) of one session, a telling set and a need at a time."""
    p, m = PARAMETERS, e.moments
    base, plausible = e.base / e.base.sum(), e.plausible[row] / e.plausible[row].sum()
    signals, places = events.signal_probabilities(), np.flatnonzero(m.happened[row])
    is_text = m.is_text[row]

    def age(place: int, mean: float) -> float:
        return float(np.exp(-m.age[row, place] / mean) / mean)

    def other(place: int) -> float:
        seen = base[m.about[row, place]] if is_text[place] else plausible @ signals[:, m.kind[row, place]]
        return float(seen) * age(place, p.other_age_days)

    def telling(place: int, need: int) -> float:
        about = p.truth * np.eye(len(base))[need] + (1 - p.truth) * base
        if is_text[place]:
            return float(text_share * about[m.about[row, place]]) * age(place, p.telling_age_days)
        return float((1 - text_share) * about @ signals[:, m.kind[row, place]]) * age(place, p.telling_age_days)

    weights = np.zeros(len(base))
    for chosen in combinations(places, p.telling_moments):
        left = [place for place in places if place not in chosen]
        texts, typed = sum(is_text[place] for place in left), sum(not is_text[place] for place in left)
        if not (1 <= texts <= p.other_texts and 1 <= typed <= p.other_events):
            continue
        ways = np.prod(range(1, texts + 1)) * np.prod(range(1, typed + 1)) * np.prod([other(place) for place in left])
        weights += ways * np.array([np.prod([telling(i, need) for i in chosen]) for need in range(len(base))])
    weights = weights * e.prior[row]
    return weights / weights.sum()


@pytest.mark.parametrize("text_share", SHARES)
def test_it_equals_brute_force(text_share):
    e = entries(text_share, 12)
    found = known(e, text_share)
    for row in range(4):
        assert np.all(e.moments.age[row, e.moments.happened[row]] < PARAMETERS.oldest_event_days)
        assert found[row] == pytest.approx(by_hand(e, row, text_share), abs=1e-9)


@pytest.mark.parametrize("reads_texts", [True, False])
@pytest.mark.parametrize("text_share", SHARES)
def test_it_is_as_sure_as_it_is_right(text_share, reads_texts):
    e = entries(text_share, 3000)
    found = known(e, text_share, reads_texts)
    right = found.argmax(axis=1) == e.need
    assert found.sum(axis=1) == pytest.approx(1.0)
    assert found.max(axis=1).mean() == pytest.approx(right.mean(), abs=4 * np.sqrt(0.25 / 3000))
    sure = found.max(axis=1) > 0.9
    if sure.sum() > 100:
        assert right[sure].mean() > 0.9


def test_texts_know_what_text_share_gives_them():
    gains = []
    for text_share in SHARES:
        e = entries(text_share, 2000)
        hits = [(known(e, text_share, reads).argmax(axis=1) == e.need).mean() for reads in (True, False)]
        gains.append(hits[0] - hits[1])
    assert gains[0] == 0.0
    assert gains[0] < 0.2 < gains[1] < gains[2]
