"""Which pair answers a user: every variant its share of the users, and a user always the same."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.serve import api
from rgalign_ray.serve.query_store import QueryStore
from rgalign_ray.serve.session_reader import Row, SessionReader

Read = Callable[[str, int | None], Awaitable[tuple[np.ndarray, str | None]]]
"""A session's text, and the seed of a query that is to be written down: e(x) and that query."""
Score = Callable[[Row, np.ndarray, np.ndarray | None], Awaitable[np.ndarray]]
"""As `FrozenRanker.score`, of one session."""


@dataclass(frozen=True)
class Variant:
    """A version that answers, with all that belongs to it."""

    name: str
    weight: float
    version: api.ServedVersion
    reader: SessionReader
    catalogue: Catalogue
    read: Read
    score: Score
    parts: Score
    """As `FrozenRanker.parts`, of one session."""
    store: QueryStore | None = None

    @property
    def everything(self) -> np.ndarray:
        """All intents, int [C]."""
        return np.arange(self.catalogue.size, dtype=np.int32)


class Variants:
    """Those that answer at a time; never changed, but replaced whole."""

    def __init__(self, all_of_them: Sequence[Variant]) -> None:
        self.by_name = {variant.name: variant for variant in all_of_them}
        total = sum(variant.weight for variant in all_of_them)
        self._shares = [variant.weight / total for variant in all_of_them]

    def of(self, user_id: str) -> Variant:
        """By a hash of the user's id and the names, so that another experiment mixes the users anew."""
        text = "\0".join([user_id, *self.by_name])
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        for variant, share in zip(self.by_name.values(), self._shares, strict=True):
            if place < share:
                return variant
            place -= share
        return max(self.by_name.values(), key=lambda variant: variant.weight)  # rounding has left nothing
