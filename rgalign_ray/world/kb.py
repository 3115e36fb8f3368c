"""The shop's knowledge base of service intents, read from `kb.yaml`.

Everywhere in the world an intent is the index of its id in sorted order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import pyarrow as pa
import yaml

from rgalign_ray import schema

WORDING_SETS = ("train", "valid", "test")

NEAR = 0.5
"""Relevance of an intent that answers half of a need."""


@dataclass(frozen=True)
class Intent:
    """One service intent. The three levels of the taxonomy are category, topic and the intent itself."""

    intent_id: str
    category: str
    topic: str
    title: str
    description: str
    near: tuple[str, ...]
    when: tuple[str, ...]
    """Situations in which the need is likely."""
    signals: tuple[str, str]
    """Typed events that the need leaves behind, the commoner first."""
    words: tuple[tuple[str, ...], ...]
    """The user's words, by wording set."""
    notices: tuple[str, ...]
    """The words of couriers, sellers, banks and the app, by wording set."""
    clickbait: bool


@cache
def entries() -> tuple[Intent, ...]:
    """All intents, sorted by id."""
    text = (resources.files("rgalign_ray") / "world" / "kb.yaml").read_text()
    found = [
        Intent(
            intent_id=intent_id,
            category=category,
            topic=topic,
            title=entry["title"],
            description=entry["description"],
            near=tuple(entry.get("near", ())),
            when=tuple(entry["when"]),
            signals=tuple(entry["signals"]),
            words=tuple(tuple(entry[name]) for name in WORDING_SETS),
            notices=tuple(entry["notice"]),
            clickbait=entry.get("clickbait", False),
        )
        for category, topics in yaml.safe_load(text).items()
        for topic, intents_of_topic in topics.items()
        for intent_id, entry in intents_of_topic.items()
    ]
    return tuple(sorted(found, key=lambda intent: intent.intent_id))


@cache
def index() -> dict[str, int]:
    """Intent id -> index."""
    return {intent.intent_id: i for i, intent in enumerate(entries())}


def intents() -> pa.Table:
    """The knowledge base as a table (`schema.INTENTS`), sorted by id."""
    rows = [{name: getattr(intent, name) for name in schema.INTENTS.names} for intent in entries()]
    return pa.Table.from_pylist(rows, schema=schema.INTENTS)


@cache
def relevance() -> np.ndarray:
    """float64 [I, I], symmetric: 1 for the intent itself, 0.5 for near-duplicates, else 0."""
    matrix = np.eye(len(entries()))
    for i, intent in enumerate(entries()):
        for other in intent.near:
            matrix[i, index()[other]] = matrix[index()[other], i] = NEAR
    matrix.setflags(write=False)
    return matrix


@cache
def clickbait() -> np.ndarray:
    """bool [I]: intents that draw clicks beyond their relevance."""
    flags = np.array([intent.clickbait for intent in entries()])
    flags.setflags(write=False)
    return flags
