"""What the gateway tells of itself, to whoever watches: nobody, or Prometheus."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rgalign_ray.serve import api

LAST = 1000


@dataclass
class Counts:
    """Counts of one gateway since its start."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By path and variant."""
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    """fallbacks (requests that the reasoner, or the query store, was asked for and did not answer, by the error's
    name), overload (requests that were refused for it), feedback, and lost_answers that could not be kept."""

    total_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Of the last answers."""

    def answered(self, path: str, variant: str, timings_ms: Mapping[str, float]) -> None:
        self.answers[path, variant] += 1
        self.total_ms.append(timings_ms["total"])

    def add(self, what: str, reason: str = "", number: int = 1) -> int:
        """Returns how many there are now."""
        self.others[what, reason] += number
        return self.others[what, reason]

    def told(self) -> api.Counted:
        """For people."""
        answers: dict[str, dict[str, int]] = {}
        for (path, variant), number in self.answers.items():
            answers.setdefault(variant, {})[path] = number
        quantiles = np.quantile(self.total_ms, [0.5, 0.99]).tolist() if self.total_ms else []
        return api.Counted(
            answers=answers,
            others={" ".join(filter(None, key)): number for key, number in self.others.items()},
            total_ms={name: round(ms, 3) for name, ms in zip(("p50", "p99"), quantiles, strict=False)},
        )
