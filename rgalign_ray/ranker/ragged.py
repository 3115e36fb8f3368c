"""Lists of different lengths, one a session, held without padding; and batches of them that stay narrow.

Padded to the longest list of a log, every session would cost as much as the one with most candidates. So
padding exists in a batch alone, and a batch in which long lists stand among short ones is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rgalign_ray.logs import lists

MAX_PLACES = 2**15
"""Candidates of a batch with their padding, at most: what a model holds of them at a time is in proportion.
A session with more is a batch of its own."""
WORTH_A_CUT = 2**11
"""Places of padding that cutting a batch in two must save: fewer cost less than another pass of a model."""

Index = slice | np.ndarray


@dataclass(frozen=True)
class Ragged:
    """n lists of values."""

    values: np.ndarray
    """[sum of counts], one list after another."""
    counts: np.ndarray
    """int64 [n], the lengths of the lists."""
    fill: Any
    """What pads them where they must be of one length."""

    @classmethod
    def of(cls, padded: np.ndarray, there: np.ndarray, fill: Any) -> Ragged:
        """The lists of a padded array [n, C]; bool [n, C] says which places are not padding."""
        return cls(padded[there], there.sum(axis=1), fill)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Index) -> Ragged:
        """The lists of a slice, of row numbers [m] or of a bool mask [n]."""
        return Ragged(self.values[self.positions(index)], self.counts[index], self.fill)

    def positions(self, index: Index) -> Index:
        """Where the values of those lists stand in `values`, one list after another."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return slice(self._starts[start], self._starts[max(start, stop)])
        counts = self.counts[index]
        return np.repeat(self._starts[:-1][index], counts) + lists.places(counts)

    def padded(self) -> np.ndarray:
        """[n, C], C the length of the longest list and at least 1."""
        width = int(self.counts.max(initial=1))
        if len(self.values) == len(self) * width:
            return self.values.reshape(len(self), width)
        return lists.padded(self.counts, self.values, width, self.fill)

    def where(self, keep: np.ndarray) -> Ragged:
        """The lists without the values that bool `keep` [sum of counts] leaves out."""
        counts = np.bincount(lists.rows(self.counts)[keep], minlength=len(self))
        return Ragged(self.values[keep], counts, self.fill)

    def sums(self) -> np.ndarray:
        """float64 [n], the sum of each list."""
        return np.bincount(lists.rows(self.counts), weights=self.values, minlength=len(self))

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])


def narrow(counts: np.ndarray, part: slice) -> list[Index]:
    """Cuts a batch so that no piece, padded to its longest list, has more than `MAX_PLACES` places or much padding.

    A batch that needs no cut stays whole, in its order. Else lists of like length come together.

    Args:
        counts: int [n], the lengths of all lists.
        part: the batch.

    Returns:
        what selects each piece's rows; nothing for an empty batch.
    """
    start, stop, _ = part.indices(len(counts))
    if stop <= start:
        return []
    order = start + np.argsort(counts[start:stop], kind="stable")
    pieces = [piece for alike in _alike(order, counts) for piece in _small(alike, counts)]
    return [part] if len(pieces) == 1 else list(pieces)


def _alike(order: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Rows in order of length, cut wherever that saves as many places of padding as a cut is worth."""
    widths, firsts = counts[order], np.arange(1, len(order))
    if len(order) < 2:
        return [order]
    saved = firsts * (widths[-1] - widths[:-1])  # by a cut behind the first 1, 2, … rows
    best = int(saved.argmax())
    if saved[best] < WORTH_A_CUT:
        return [order]
    return [*_alike(order[: best + 1], counts), *_alike(order[best + 1 :], counts)]


def _small(order: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Rows in order of length, cut so that no piece has more than `MAX_PLACES` places."""
    pieces = []
    first = 0
    for last, width in enumerate(counts[order]):
        if last > first and (last + 1 - first) * width > MAX_PLACES:
            pieces.append(order[first:last])
            first = last
    return [*pieces, order[first:]]
