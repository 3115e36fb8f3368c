"""How many requests are taken into work, on a clock of its own."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from rgalign_ray.serve.access import RefusedError
from rgalign_ray.serve.admission import Admission

BUDGET_MS = 250.0


class Service:
    """Answers one request after the other, `per_s` of them, as they come in at random times at `asked_per_s`."""

    def __init__(self, per_s: float, asked_per_s: float, seconds: float, **limits: int) -> None:
        self.now, free = 0.0, 0.0
        limits = {"least": 4, "first": 32, "most": 128} | limits
        self.admission = Admission(BUDGET_MS, **limits, clock=lambda: self.now)
        self.took_ms: list[float] = []
        self.refused = 0
        in_work: list[tuple[float, float]] = []
        for arrived in np.random.default_rng(0).exponential(1 / asked_per_s, int(seconds * asked_per_s)).cumsum():
            while in_work and in_work[0][0] <= arrived:
                self.now, came = heapq.heappop(in_work)
                self.admission.leave(took_ms=(self.now - came) * 1000)
            self.now = arrived
            try:
                self.admission.enter()
            except RefusedError:
                self.refused += 1
                continue
            free = max(free, arrived) + 1 / per_s
            self.took_ms.append((free - arrived) * 1000)
            heapq.heappush(in_work, (free, arrived))
        self.answered_per_s = len(self.took_ms) / seconds


@pytest.mark.parametrize("per_s", [50.0, 200.0, 800.0])
def test_under_twice_the_load_all_it_can_answer_is_answered_in_time(per_s: float) -> None:
    service = Service(per_s, 2 * per_s, seconds=120.0, most=1000)
    settled = service.took_ms[len(service.took_ms) // 4 :]
    assert np.quantile(settled, 0.99) < 1.2 * BUDGET_MS
    assert service.answered_per_s > 0.95 * per_s


def test_nobody_is_refused_where_there_is_room() -> None:
    service = Service(per_s=200.0, asked_per_s=140.0, seconds=120.0)
    assert service.refused == 0 and max(service.took_ms) < BUDGET_MS


def test_the_limit_rises_again_after_a_slow_moment() -> None:
    now = 0.0
    admission = Admission(BUDGET_MS, 4, 32, 128, clock=lambda: now)
    for _ in range(100):
        now += 1.0
        admission.enter(1)
        admission.leave(1, 10 * BUDGET_MS)
    assert admission.limit == 4
    for _ in range(100):
        number = int(admission.limit)
        admission.enter(number)
        admission.leave(number, BUDGET_MS / 2)
    assert 10 < admission.limit < 20


def test_late_answers_of_one_moment_lower_it_once_and_an_idle_machine_tells_nothing() -> None:
    admission = Admission(BUDGET_MS, 1, 32, 128, clock=lambda: 0.0)
    admission.enter(32)
    for _ in range(10):
        admission.leave(1, 2 * BUDGET_MS)
    assert admission.limit == pytest.approx(0.8 * 32)
    admission.leave(22, None)
    for _ in range(100):
        admission.enter()
        admission.leave(1, 1.0)
    assert admission.limit == pytest.approx(0.8 * 32) and admission.in_work == 0


def test_a_batch_above_the_limit_is_taken_where_nothing_else_is() -> None:
    admission = Admission(BUDGET_MS, 1, 8, 8)
    admission.enter(100)
    with pytest.raises(RefusedError, match="100 requests are in work") as refused:
        admission.enter()
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    admission.leave(100)
    admission.enter()
