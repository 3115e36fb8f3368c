"""How many requests are in work at a time: as many as are answered within the budget, and beyond them none waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from rgalign_ray.serve.access import RefusedError

LESS = 0.8
"""What is left of the limit when an answer came late."""
RETRY_AFTER_S = 1


class Admission:
    """A limit that finds itself: one more with each limit of answers in time, a fifth less where one is late.

    Who waits in a queue longer than the budget is answered in vain, and all behind her as well. Additive increase,
    multiplicative decrease (Chiu and Jain, 1989) holds the queue to what the budget has room for, without being told
    how fast the machine is.

    Args:
        budget_ms: within which an answer is in time.
        least: which it never goes below, so that one slow moment does not refuse the few who are always there.
        first: limit to begin with.
        most: which it never goes above.
        clock: seconds.
    """

    def __init__(
        self, budget_ms: float, least: int, first: int, most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget_ms, self.least, self.limit, self.most = budget_ms, least, float(first), most
        self.in_work = 0
        self._clock, self._lowered = clock, -float("inf")

    def enter(self, number: int = 1) -> None:
        """Takes requests into work; where there are none in work, however many.

        Raises:
            RefusedError: 429 beyond the limit.
        """
        if self.in_work and self.in_work + number > self.limit:
            told = f"{self.in_work} requests are in work, as many as are answered in time"
            raise RefusedError(429, told, {"Retry-After": str(RETRY_AFTER_S)})
        self.in_work += number

    def leave(self, number: int = 1, took_ms: float | None = None) -> None:
        """Ends them.

        Args:
            number: of requests.
            took_ms: what the answer took of its budget; None where it tells nothing of the load.
        """
        full = 2 * self.in_work > self.limit
        self.in_work -= number
        if took_ms is None:
            return
        if took_ms <= self.budget_ms:
            if full:  # in time on an idle machine says nothing of a higher limit
                self.limit = min(self.limit + 1 / self.limit, self.most)
            return
        now = self._clock()
        if now - self._lowered > self.budget_ms / 1000:  # what came in under the higher limit is still to come
            self.limit, self._lowered = max(self.least, LESS * self.limit), now
