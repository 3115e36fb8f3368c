"""Free texts of a session from a grammar: what it is about, who speaks, and one of three disjoint sets of wordings.

A text is a phrase of the knowledge base's entry with its slots filled; a chat gets an opening and an end.
Phrases of the three sets share no string, so that memorising strings fails and reading works.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.events import CHAT, NOTICE

ITEMS = (
    "phone case", "jacket", "lamp", "blender", "backpack", "dress", "keyboard", "lipstick", "toy car", "kettle",
    "sneakers", "watch", "tent", "novel", "pillow", "headset", "rice cooker", "skirt", "drone", "mirror",
)  # fmt: skip
SHOPS = ("Sunny Home", "Tek Corner", "Bella Mode", "Kiddo", "Green Pantry", "Peak Sports", "Page One", "Glow Bar")
PARCEL = (("parcel", "package"), ("shipment",), ("box", "delivery"))
"""By wording set."""
OPENINGS = (
    ("Hello, ", "Hi there, ", "Good day, "),
    ("Excuse me, ", "Hey, "),
    ("Dear shop, ", "Greetings, "),
)
ENDINGS = (("", ", please help", ", thanks"), ("", ", what can I do?"), ("", ", I need an answer", ", kindly advise"))
SLOTS = 7
"""Uniform variables that one text uses."""


@cache
def phrases(about: int, channel: int, wording: int) -> tuple[str, ...]:
    """The phrases for an intent (index), channel and wording set (index)."""
    intent = kb.entries()[about]
    return (intent.notices[wording],) if channel == NOTICE else intent.words[wording]


def write(draws: Draws, keys: np.ndarray, about: np.ndarray, channel: np.ndarray, wording: np.ndarray) -> list[str]:
    """One text for each row: keys uint64 [n] tell the draws apart; the others are indices [n]."""
    u = draws.uniform("text", keys, SLOTS)
    rows = zip(about.tolist(), channel.tolist(), wording.tolist(), u.tolist(), strict=True)
    return [_write(*row) for row in rows]


def _write(about: int, channel: int, wording: int, u: list[float]) -> str:
    text = _one(phrases(about, channel, wording), u[0])
    if "{" in text:
        text = text.format(
            parcel=_one(PARCEL[wording], u[1]),
            item=_one(ITEMS, u[2]),
            shop=_one(SHOPS, u[2]),
            days=2 + int(u[3] * 12),
            amount=f"${5 + int(u[4] * 195)}",
        )
    if channel == CHAT:
        return _one(OPENINGS[wording], u[5]) + text + _one(ENDINGS[wording], u[6])
    return text


def _one(choices: tuple[str, ...], u: float) -> str:
    return choices[int(u * len(choices))]
