"""Whether what is served looks like what was learned from: the population stability index of every feature.

PSI = Σ over bins (p − q) · ln(p / q), of the shares p of live sessions and q of training's (Siddiqi, 2006, "Credit
risk scorecards"). Below 0.1 little has changed, above 0.25 much has; of n live sessions in b bins, (b − 1) / n is luck.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

RARE = 0.01
"""Values of a smaller share in training are one bin."""
LEAST = 0.5
"""Sessions that a bin counts as where there is none, so that the logarithm is finite."""
HISTORY = "history length"


class Drift:
    """Compares the last sessions with training's.

    Args:
        names: of the single-valued fields, in the order of `FeatureSpace.transform`.
        reference: training sessions as it transforms them.
        window: how many of the last sessions count.
        least: below so many nothing is told.
    """

    def __init__(
        self, names: list[str], reference: Mapping[str, np.ndarray], window: int = 5000, least: int = 500
    ) -> None:
        self.names = [*names, HISTORY]
        self.least = least
        self._lock = threading.Lock()
        self._live: deque[np.ndarray] = deque(maxlen=window)
        self._bins: list[np.ndarray] = []
        self._shares: list[np.ndarray] = []
        for column in _columns(reference).T:
            values, counts = np.unique(column, return_counts=True)
            common = counts >= RARE * len(column)
            self._bins.append(values[common])
            self._shares.append(_shares(np.append(counts[common], counts[~common].sum())))

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Sessions that are served, as `FeatureSpace.transform` gives them."""
        with self._lock:
            self._live.extend(_columns(features))

    def psi(self) -> dict[str, float]:
        """By field; empty where too few sessions are known."""
        with self._lock:
            if len(self._live) < self.least:
                return {}
            live = np.stack(self._live)
        found = {}
        for name, column, bins, q in zip(self.names, live.T, self._bins, self._shares, strict=True):
            place = np.where(np.isin(column, bins), np.searchsorted(bins, column), len(bins))
            p = _shares(np.bincount(place, minlength=len(bins) + 1))
            found[name] = float(np.sum((p - q) * np.log(p / q)))
        return found


def _columns(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """int [B, fields + 1]: ids of the single-valued fields, and the events of the history."""
    return np.column_stack([features["fields"], (features["history"] > 0).sum(axis=1)])


def _shares(counts: np.ndarray) -> np.ndarray:
    padded = np.maximum(counts, LEAST)
    return padded / padded.sum()
