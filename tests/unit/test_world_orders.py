from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rgalign_ray.world import orders, users
from rgalign_ray.world.draws import Draws

LEGAL = {
    "placed": {"paid", "cancelled"},
    "paid": {"packed", "cancelled"},
    "packed": {"shipped", "cancelled"},
    "shipped": {"delayed", "out for delivery"},
    "delayed": {"out for delivery"},
    "out for delivery": {"delivered"},
    "delivered": {"return asked"},
    "return asked": {"refunded"},
    "refunded": set(),
    "cancelled": set(),
}


@settings(max_examples=200, deadline=None)
@given(arrays(float, (1, 1, 16), elements=st.floats(1e-6, 1 - 1e-6)), st.booleans(), st.floats(2.0, 8.0))
def test_an_order_only_makes_legal_transitions(u, returner, promised):
    entered = orders.transitions(np.zeros((1, 1)), np.full((1, 1), promised), u, np.array([returner]))[0, 0]
    visited = [orders.STATES[i] for i in np.argsort(entered, kind="stable") if np.isfinite(entered[i])]
    assert visited[0] == "placed"
    assert all(after in LEGAL[before] for before, after in pairwise(visited))
    assert visited[-1] in {"delivered", "refunded", "cancelled"}


def test_the_state_is_the_one_entered_last():
    entered = np.full((1, len(orders.STATES)), np.inf)
    entered[0, [orders.PLACED, orders.PAID, orders.SHIPPED]] = 0.0, 1.0, 2.5
    found = [orders.STATES[orders.state_at(entered, np.array([t]))[0]] for t in (0.0, 0.9, 1.0, 2.6)]
    assert found == ["placed", "placed", "paid", "shipped"]


def test_orders_seen_lie_in_the_past_newest_first():
    draws = Draws(5)
    user = users.look_up(draws, np.arange(2000, dtype=np.uint64))
    t = draws.uniform("t", user.number, 1)[:, 0] * 40.0
    found = orders.look_up(draws, user, t)
    assert np.all(found.days_since_placed >= 0.0)
    assert np.all(np.diff(found.days_since_placed, axis=1) > 0.0)
    assert np.all(np.isfinite(found.days_in_tab)) and np.all(found.days_in_tab >= found.days_in_state)
    assert set(np.unique(found.state[found.exists])) == set(range(len(orders.STATES)))


def test_an_order_is_the_same_one_when_seen_later():
    draws = Draws(5)
    user = users.look_up(draws, np.arange(500, dtype=np.uint64))
    early, late = (orders.look_up(draws, user, np.full(500, t)) for t in (10.0, 10.5))
    same = np.isclose(late.days_since_placed[:, 0] - early.days_since_placed[:, 0], 0.5)
    assert same.mean() > 0.8
    assert np.array_equal(early.amount[same, 0], late.amount[same, 0])
