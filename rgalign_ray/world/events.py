"""Moments before the entry: typed events, and texts with what they speak of.

`telling_moments` moments of a session concern its need (each in truth with probability `truth`, else
something else). Each goes into a text with probability `text_share`, otherwise into a typed event. On
top come typed events and texts about other things: typed ones plausible in the state, texts about
anything. Hence texts know nothing of the need at text_share = 0, and typed events nothing at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world.draws import Draws, pick, pick_rows
from rgalign_ray.world.parameters import PARAMETERS

CHANNELS = ("search", "chat", "notice")
SEARCH, CHAT, NOTICE = range(len(CHANNELS))


@cache
def typed_kinds() -> tuple[str, ...]:
    """Names of the typed events, sorted."""
    return tuple(sorted({name for intent in kb.entries() for name in intent.signals}))


@cache
def kinds() -> tuple[str, ...]:
    """Names of all events: the typed ones, then the channels of text."""
    return typed_kinds() + CHANNELS


@cache
def _signals() -> np.ndarray:
    """int [I, 2]: the typed events of each need."""
    return np.array([[typed_kinds().index(name) for name in intent.signals] for intent in kb.entries()])


@cache
def signal_probabilities() -> np.ndarray:
    """float64 [I, typed kinds]: P(typed event | what it is about)."""
    matrix = np.zeros((len(kb.entries()), len(typed_kinds())))
    common, rare = _signals().T
    matrix[np.arange(len(matrix)), common] = PARAMETERS.first_signal
    matrix[np.arange(len(matrix)), rare] = 1.0 - PARAMETERS.first_signal
    matrix.setflags(write=False)
    return matrix


@dataclass(frozen=True)
class Moments:
    """Moments of n sessions, oldest first: arrays [n, M]; where `happened` is false there is none."""

    happened: np.ndarray
    kind: np.ndarray
    """Index into `kinds()`."""
    about: np.ndarray
    """Intent index."""
    age: np.ndarray
    """Days before the entry."""

    @property
    def is_text(self) -> np.ndarray:
        return self.happened & (self.kind >= len(typed_kinds()))


def draw(
    draws: Draws, session: np.ndarray, need: np.ndarray, plausible: np.ndarray, base: np.ndarray, text_share: float
) -> Moments:
    """The moments of sessions (keys uint64 [n]) with these needs [n].

    Args:
        plausible: weights [n, I] of other concerns that fit the state, for typed events.
        base: weights [I] of other concerns, for texts and for telling moments that miss the need.
    """
    p = PARAMETERS
    n, telling, other = len(session), p.telling_moments, p.other_events + p.other_texts
    u = draws.uniform("moments", session, 4 * telling)
    anything = pick(draws.uniform("anything", session, telling + p.other_texts), base / base.sum())
    about = np.where(u[:, :telling] < p.truth, need[:, None], anything[:, :telling])
    in_text = u[:, telling : 2 * telling] < text_share
    telling_kind = np.where(in_text, _channel(u[:, 2 * telling : 3 * telling]), _typed(about, u[:, 3 * telling :]))

    v = draws.uniform("other moments", session, 2 + 2 * p.other_events + p.other_texts)
    events = 1 + np.floor(v[:, :1] * p.other_events)
    texts = 1 + np.floor(v[:, 1:2] * p.other_texts)
    other_about = pick_rows(v[:, 2 : 2 + p.other_events], plausible)
    other_kind = _typed(other_about, v[:, 2 + p.other_events : 2 + 2 * p.other_events])

    w = -np.log(draws.uniform("ages", session, telling + other))
    means = np.array([p.telling_age_days] * telling + [p.other_age_days] * other)
    age = np.clip(w * means, p.newest_event_days, p.oldest_event_days)
    happened = np.concatenate(
        [np.ones((n, telling), bool), np.arange(p.other_events) < events, np.arange(p.other_texts) < texts], axis=1
    )
    order = np.argsort(np.where(happened, -age, np.inf), axis=1, kind="stable")
    every = (
        happened,
        np.concatenate([telling_kind, other_kind, _channel(v[:, 2 + 2 * p.other_events :])], axis=1),
        np.concatenate([about, other_about, anything[:, telling:]], axis=1),
        age,
    )
    return Moments(*(np.take_along_axis(values, order, axis=1) for values in every))


def _channel(u: np.ndarray) -> np.ndarray:
    return len(typed_kinds()) + pick(u, PARAMETERS.channels)


def _typed(about: np.ndarray, u: np.ndarray) -> np.ndarray:
    return _signals()[about, (u > PARAMETERS.first_signal).astype(int)]
