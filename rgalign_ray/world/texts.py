"""Free texts of a session from a grammar: what it is about, who speaks, and one of three disjoint sets of wordings.

A text is a phrase of the knowledge base's entry with its slots filled; a chat gets an opening and an end.
Phrases of the three sets share no string, so that memorising strings fails and reading works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray.world import kb
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.events import CHANNELS, CHAT, NOTICE

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
DAYS = tuple(str(2 + days) for days in range(12))
AMOUNTS = tuple(f"${5 + amount}" for amount in range(195))
SLOTS: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "parcel": (1, PARCEL),
    "item": (2, (ITEMS,) * 3),
    "shop": (2, (SHOPS,) * 3),
    "days": (3, (DAYS,) * 3),
    "amount": (4, (AMOUNTS,) * 3),
    "opening": (5, OPENINGS),
    "ending": (6, ENDINGS),
}
"""What may stand in a phrase's {slot}: which of a text's uniform variables decides, and the choices by wording set."""
UNIFORMS = 7
"""Uniform variables that one text uses; the first chooses its phrase."""


@cache
def phrases(about: int, channel: int, wording: int) -> tuple[str, ...]:
    """The phrases for an intent (index), channel and wording set (index)."""
    intent = kb.entries()[about]
    return (intent.notices[wording],) if channel == NOTICE else intent.words[wording]


def write(
    draws: Draws, keys: np.ndarray, about: np.ndarray, channel: np.ndarray, wording: np.ndarray
) -> pa.StringArray:
    """One text for each row: keys uint64 [n] tell the draws apart; the others are indices [n]."""
    grammar = _grammar()
    u = draws.uniform("text", keys, UNIFORMS)
    place = (about, channel, wording)
    pieces = grammar.pieces[_one(grammar.first_phrase[place], grammar.phrases[place], u[:, 0])]
    for slot, (variable, _) in enumerate(SLOTS.values()):
        filler = _one(grammar.first_filler[slot, wording], grammar.fillers[slot, wording], u[:, variable])
        pieces = np.where(pieces == -1 - slot, filler[:, None], pieces)
    return pc.binary_join_element_wise(*(grammar.vocabulary.take(pa.array(column)) for column in pieces.T), "")


def _one(first: np.ndarray, count: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One of the numbers `first` … `first` + `count` − 1."""
    return first + (u * count).astype(int)


@dataclass(frozen=True)
class _Grammar:
    """Phrases cut into pieces, so that texts are written by the column."""

    vocabulary: pa.StringArray
    """Every string that a text can be put together from, "" first."""
    pieces: np.ndarray
    """int [phrases, longest]: a place in the vocabulary, or −1 − the number of a slot."""
    first_phrase: np.ndarray
    """int [I, channels, wordings]: the first row of `pieces` for what is to be said, and `phrases` many follow."""
    phrases: np.ndarray
    first_filler: np.ndarray
    """int [slots, wordings]: the first place in the vocabulary of what fills a slot, and `fillers` many follow."""
    fillers: np.ndarray


@cache
def _grammar() -> _Grammar:
    vocabulary = [""]
    first_filler, fillers = np.zeros((2, len(SLOTS), len(kb.WORDING_SETS)), int)
    for slot, (_, choices) in enumerate(SLOTS.values()):
        for wording, strings in enumerate(choices):
            first_filler[slot, wording], fillers[slot, wording] = len(vocabulary), len(strings)
            vocabulary += strings
    rows: list[list[int]] = []
    shape = (len(kb.entries()), len(CHANNELS), len(kb.WORDING_SETS))
    first_phrase, count = np.zeros((2, *shape), int)
    for place in np.ndindex(shape):
        found = phrases(*place)
        first_phrase[place], count[place] = len(rows), len(found)
        for phrase in found:
            whole = f"{{opening}}{phrase}{{ending}}" if place[1] == CHAT else phrase
            rows.append([])
            for piece in filter(None, re.split(r"({\w+})", whole)):
                if piece.startswith("{"):
                    rows[-1].append(-1 - list(SLOTS).index(piece[1:-1]))
                else:
                    rows[-1].append(len(vocabulary))
                    vocabulary.append(piece)
    pieces = np.zeros((len(rows), max(map(len, rows))), int)
    for row, found_pieces in zip(pieces, rows, strict=True):
        row[: len(found_pieces)] = found_pieces
    return _Grammar(pa.array(vocabulary), pieces, first_phrase, count, first_filler, fillers)
