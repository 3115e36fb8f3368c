"""Losses against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.ranker import losses

SESSIONS, WIDTH = 6, 5


def _draw(seed: int) -> tuple[torch.Tensor, ...]:
    draw = np.random.default_rng(seed)
    scores = torch.tensor(draw.normal(size=(SESSIONS, WIDTH)) * 3)
    mask = torch.tensor(np.arange(WIDTH) < draw.integers(1, WIDTH + 1, size=SESSIONS)[:, None])
    clicks = torch.tensor(draw.random((SESSIONS, WIDTH)) < 0.3)
    shown = clicks | torch.tensor(draw.random((SESSIONS, WIDTH)) < 0.5)
    return scores, mask, clicks, shown


def _softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_listnet_is_the_cross_entropy_of_clicks_normalised(seed: int) -> None:
    scores, mask, clicks, _ = _draw(seed)
    expected = 0.0
    for s, m, c in zip(scores.tolist(), mask.tolist(), clicks.tolist(), strict=True):
        chances = _softmax([x for x, real in zip(s, m, strict=True) if real])
        clicked = [x for x, real in zip(c, m, strict=True) if real]
        if any(clicked):
            expected -= sum(math.log(p) for p, x in zip(chances, clicked, strict=True) if x) / sum(clicked)
    found = losses.listnet(scores, clicks, mask)
    assert float(found) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_pointwise_is_the_cross_entropy_of_unclicked_slates(seed: int) -> None:
    scores, mask, clicks, shown = _draw(seed)
    expected = 0.0
    for s, m, c, x in zip(scores.tolist(), mask.tolist(), clicks.tolist(), shown.tolist(), strict=True):
        slate = [v for v, real, seen in zip(s, m, x, strict=True) if real and seen]
        if slate and not any(a and b for a, b in zip(c, m, strict=True)):
            expected -= sum(math.log(1 - 1 / (1 + math.exp(-v))) for v in slate) / len(slate)
    found = losses.pointwise(scores, shown, clicks, mask)
    assert float(found) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_agreement_is_kl_divergence_of_sessions_with_a_query(seed: int) -> None:
    teacher, mask, _, _ = _draw(seed)
    student = _draw(seed + 1)[0]
    is_null = torch.arange(SESSIONS) % 3 == 0
    expected = 0.0
    for t, s, m, null in zip(teacher.tolist(), student.tolist(), mask.tolist(), is_null.tolist(), strict=True):
        p = _softmax([x for x, real in zip(t, m, strict=True) if real])
        q = _softmax([x for x, real in zip(s, m, strict=True) if real])
        expected += 0.0 if null else sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = losses.agreement(teacher, student, mask, is_null)
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_gradients_point_the_right_way() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    clicks = torch.tensor([[True, False, False], [False, False, False]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses.listnet(scores, clicks, mask).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    scores.grad = None
    losses.pointwise(scores, ~mask | clicks, clicks, torch.ones_like(mask)).backward()
    assert scores.grad is None or (scores.grad == 0).all()
    losses.pointwise(scores, mask, clicks, mask).backward()
    assert (scores.grad[1] > 0).all()


def test_agreement_teaches_the_student_alone_and_not_where_null() -> None:
    teacher = torch.randn(2, 3, requires_grad=True)
    student = torch.randn(2, 3, requires_grad=True)
    losses.agreement(teacher, student, torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, False])).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad[0] == 0).all()
    assert (student.grad[1] != 0).all()
