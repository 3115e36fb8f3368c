"""Orders as a state machine with a clock.

An order is the list of times at which it enters its states (infinite where it never does); its state at
time t is the one it entered last. Times are days since the first day of the log. A user's j-th order
is a pure function of (world seed, user, j), so nothing has to be kept between sessions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rgalign_ray.world.draws import Draws, pick
from rgalign_ray.world.parameters import PARAMETERS, REGION_EXTRA_DAYS
from rgalign_ray.world.users import PAYMENT_METHODS, Users

STATES = (
    "placed",
    "paid",
    "packed",
    "shipped",
    "delayed",
    "out for delivery",
    "delivered",
    "return asked",
    "refunded",
    "cancelled",
)
PLACED, PAID, PACKED, SHIPPED, DELAYED, OUT, DELIVERED, RETURN_ASKED, REFUNDED, CANCELLED = range(len(STATES))

TABS = ("To Pay", "To Ship", "To Receive", "Completed", "Return/Refund", "Cancelled")
TO_PAY, TO_SHIP, TO_RECEIVE, COMPLETED, RETURN_REFUND, CANCELLED_TAB = range(len(TABS))
TAB_OF_STATE = np.array([0, 1, 1, 2, 2, 2, 3, 4, 4, 5])
FIRST_STATE_OF_TAB = np.array([PLACED, PAID, SHIPPED, DELIVERED, RETURN_ASKED, CANCELLED])

CATEGORIES = ("fashion", "beauty", "electronics", "home", "toys", "sports", "groceries", "books")
CATEGORY_SHARES = (0.24, 0.16, 0.16, 0.14, 0.09, 0.08, 0.08, 0.05)
COURIERS = ("swift", "national post", "redbox", "kite", "harbour", "ten four")
SHIPPING = ("standard", "economy", "express")
SHIPPING_SHARES = (0.6, 0.25, 0.15)


@dataclass(frozen=True)
class Orders:
    """The newest orders of n rows at their times t, newest first: arrays [n, orders_seen].

    Where `exists` is false a user had fewer orders, and every other entry is meaningless.
    """

    exists: np.ndarray
    state: np.ndarray
    days_in_state: np.ndarray
    tab: np.ndarray
    days_in_tab: np.ndarray
    days_since_placed: np.ndarray
    days_late: np.ndarray
    """Days beyond the promised delivery while under way, else 0."""
    promised_days: np.ndarray
    amount: np.ndarray
    items: np.ndarray
    category: np.ndarray
    courier: np.ndarray
    shipping: np.ndarray
    payment: np.ndarray
    seller_rating: np.ndarray
    seller_reply_hours: np.ndarray
    voucher_used: np.ndarray


def look_up(draws: Draws, users: Users, t: np.ndarray) -> Orders:
    """The orders that `users` see at times `t` (float64 [n])."""
    number, placed = _newest(draws, users, t)
    entity = (users.number[:, None] << np.uint64(24)) + (number + 2**20).astype(np.uint64)
    u = draws.uniform("order", entity, 26)
    promised = 3.0 + np.array(REGION_EXTRA_DAYS)[users.region][:, None] + np.zeros_like(placed)
    entered = transitions(placed, promised, u, users.returner)
    clock = t[:, None]
    state = state_at(entered, clock)
    tab = TAB_OF_STATE[state]
    shipped = entered[..., SHIPPED]
    late = np.where(tab == TO_RECEIVE, clock - shipped - promised, 0.0)
    return Orders(
        exists=placed >= -users.tenure_at_start[:, None],
        state=state,
        days_in_state=clock - _take(entered, state),
        tab=tab,
        days_in_tab=clock - _take(entered, FIRST_STATE_OF_TAB[tab]),
        days_since_placed=clock - placed,
        days_late=np.maximum(late, 0.0),
        promised_days=promised,
        amount=np.round(np.exp(2.8 + 1.8 * (u[..., 16] - 0.5)), 2),
        items=1 + np.floor(-1.2 * np.log(u[..., 17])),
        category=pick(u[..., 18], CATEGORY_SHARES),
        courier=np.floor(u[..., 19] * len(COURIERS)).astype(int),
        shipping=pick(u[..., 20], SHIPPING_SHARES),
        payment=np.where(
            u[..., 21] < 0.7, users.default_payment[:, None], np.floor(u[..., 22] * len(PAYMENT_METHODS)).astype(int)
        ),
        seller_rating=np.round(5.0 - 1.5 * u[..., 23] ** 2, 1),
        seller_reply_hours=np.round(-12.0 * np.log(u[..., 24]), 1),
        voucher_used=u[..., 25] < users.voucher_share[:, None],
    )


def _newest(draws: Draws, users: Users, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (int64) and placing times [n, orders_seen] of the orders placed by time t, newest first."""
    seen = PARAMETERS.orders_seen
    gap, phase = users.order_gap[:, None], users.order_phase[:, None]
    number = np.floor((t[:, None] - phase) / gap).astype(np.int64) - np.arange(seen + 1)
    entity = (users.number[:, None] << np.uint64(24)) + (number + 2**20).astype(np.uint64)
    placed = phase + (number + 0.9 * draws.uniform("order time", entity, 1)[..., 0]) * gap
    first_is_future = (placed[:, :1] > t[:, None]).astype(int)
    kept = first_is_future + np.arange(seen)
    return np.take_along_axis(number, kept, axis=1), np.take_along_axis(placed, kept, axis=1)


def transitions(placed: np.ndarray, promised: np.ndarray, u: np.ndarray, returner: np.ndarray) -> np.ndarray:
    """Times [n, orders, states] at which orders enter each state, from uniform variables u [n, orders, >= 16]."""
    p = PARAMETERS
    wait = -np.log(u)  # exponential, mean 1
    never_paid = u[..., 0] < p.never_paid
    paid = placed + np.where(u[..., 1] < p.pays_late, 0.2 + 1.3 * u[..., 2], 0.01)
    paid = np.where(never_paid, np.inf, paid)
    packing = 0.2 + 0.7 * wait[..., 3]
    packed = paid + np.where(u[..., 4] < p.slow_packing, 5.0 * packing, packing)
    shipped = packed + 0.2 + 0.3 * wait[..., 5]
    transit = promised * (0.5 + 0.4 * u[..., 6])
    transit += np.where(u[..., 7] < p.delayed, 2.0 + p.delay_days * wait[..., 8], 0.0)
    out = shipped + transit
    delivered = out + 0.2 + 0.2 * wait[..., 9] + np.where(u[..., 10] < p.failed_attempt, 2.0, 0.0)
    returns = np.where(returner, p.returned_by_returners, p.returned)[:, None]
    return_asked = np.where(u[..., 11] < returns, delivered + 0.3 + 5.0 * u[..., 12], np.inf)
    refunded = return_asked + 2.0 + 4.0 * wait[..., 13]
    delayed = np.where(shipped + promised < out, shipped + promised, np.inf)

    withdrawn = placed + 0.1 + 2.0 * u[..., 15]
    by_user = (u[..., 14] < p.cancelled_by_user) & (withdrawn < shipped)
    cancelled = np.where(never_paid, placed + 1.0 + 2.0 * u[..., 15], np.where(by_user, withdrawn, np.inf))
    stages = [placed, paid, packed, shipped, delayed, out, delivered, return_asked, refunded]
    cut = [np.where(stage < cancelled, stage, np.inf) for stage in stages[1:]]
    return np.stack([placed, *cut, cancelled], axis=-1)


def state_at(entered: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Index of the state entered last by time t; `entered` [..., states], t broadcast over the rest."""
    return np.where(entered <= t[..., None], entered, -np.inf).argmax(axis=-1)


def _take(entered: np.ndarray, state: np.ndarray) -> np.ndarray:
    return np.take_along_axis(entered, state[..., None], axis=-1)[..., 0]
