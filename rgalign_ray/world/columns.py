"""The typed feature columns of a session; all of them date from before the entry."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rgalign_ray.world import events, needs
from rgalign_ray.world import orders as machine
from rgalign_ray.world import users as people
from rgalign_ray.world.events import Moments
from rgalign_ray.world.orders import Orders
from rgalign_ray.world.parameters import REGIONS
from rgalign_ray.world.users import Users

WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
COUNT_WINDOW_DAYS = 7.0


def typed(
    users: Users, orders: Orders, moments: Moments, t: np.ndarray, payment_failures: np.ndarray
) -> dict[str, pa.Array]:
    """Column name -> array [n] of sessions at times t (days since the first day)."""
    return {
        **_of_user(users, orders, t, payment_failures),
        **_of_newest_order(orders),
        **_of_other_orders(orders),
        **_of_events(moments),
    }


def _of_user(users: Users, orders: Orders, t: np.ndarray, payment_failures: np.ndarray) -> dict[str, pa.Array]:
    orders_90d = np.minimum(90.0, users.tenure_at_start + t) / users.order_gap
    mean_amount = np.where(orders.exists, orders.amount, 0.0).sum(axis=1) / np.maximum(orders.exists.sum(axis=1), 1)
    return {
        "region": _name(REGIONS, users.region),
        "tier": _name(people.TIERS, users.tier),
        "platform": _name(people.PLATFORMS, users.platform),
        "app_version": _name(people.APP_VERSIONS, users.app_version),
        "acquisition": _name(people.ACQUISITIONS, users.acquisition),
        "city_size": _name(people.CITY_SIZES, users.city_size),
        "default_payment": _name(people.PAYMENT_METHODS, users.default_payment),
        "weekday": _name(WEEKDAYS, np.floor(t).astype(int) % 7),
        "hour": _number(np.floor(t % 1.0 * 24.0)),
        "days_to_campaign": _number(needs.days_to_campaign(t)),
        "tenure_days": _number(np.floor(users.tenure_at_start + t)),
        "orders_90d": _number(np.floor(orders_90d)),
        "spend_90d": _number(orders_90d * mean_amount),
        "cancel_rate": _number(users.cancel_rate),
        "return_rate": _number(users.return_rate),
        "complaint_rate": _number(users.complaint_rate),
        "voucher_share": _number(users.voucher_share),
        "coins": _number(np.floor(orders_90d * mean_amount * 0.1)),
        "wallet_vouchers": _number(np.floor(users.voucher_share * 10.0)),
        "cards_saved": _number(users.cards_saved),
        "payment_failures_30d": _number(payment_failures),
        "payment_methods": _lists(
            people.PAYMENT_METHODS, np.tile(np.arange(users.has_payment.shape[1]), (len(t), 1)), users.has_payment
        ),
    }


def _of_newest_order(orders: Orders) -> dict[str, pa.Array]:
    there = orders.exists[:, 0]

    def named(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
        return _name((*names, "none"), np.where(there, codes[:, 0], len(names)))

    def number(values: np.ndarray) -> pa.Array:
        return _number(np.where(there, values[:, 0], np.nan))

    return {
        "order_status": named(machine.STATES, orders.state),
        "order_tab": named(machine.TABS, orders.tab),
        "order_category": named(machine.CATEGORIES, orders.category),
        "order_courier": named(machine.COURIERS, orders.courier),
        "order_shipping": named(machine.SHIPPING, orders.shipping),
        "order_payment": named(people.PAYMENT_METHODS, orders.payment),
        "order_days_in_status": number(orders.days_in_state),
        "order_days_in_tab": number(orders.days_in_tab),
        "order_days_since_placed": number(orders.days_since_placed),
        "order_days_late": number(orders.days_late),
        "order_promised_days": number(orders.promised_days),
        "order_amount": number(orders.amount),
        "order_items": number(orders.items),
        "order_seller_rating": number(orders.seller_rating),
        "order_seller_reply_hours": number(orders.seller_reply_hours),
        "order_voucher_used": number(orders.voucher_used),
    }


def _of_other_orders(orders: Orders) -> dict[str, pa.Array]:
    there = orders.exists[:, 1]
    tab = np.where(orders.exists, orders.tab, len(machine.TABS))
    under_way = orders.exists & (orders.tab <= machine.TO_RECEIVE)
    return {
        "second_status": _name((*machine.STATES, "none"), np.where(there, orders.state[:, 1], len(machine.STATES))),
        "second_tab": _name((*machine.TABS, "none"), tab[:, 1]),
        "second_category": _name(
            (*machine.CATEGORIES, "none"), np.where(there, orders.category[:, 1], len(machine.CATEGORIES))
        ),
        "second_days_in_tab": _number(np.where(there, orders.days_in_tab[:, 1], np.nan)),
        "second_days_late": _number(np.where(there, orders.days_late[:, 1], np.nan)),
        "second_amount": _number(np.where(there, orders.amount[:, 1], np.nan)),
        "open_orders": _number(under_way.sum(axis=1)),
        "orders_to_receive": _number((tab == machine.TO_RECEIVE).sum(axis=1)),
        "returns_open": _number((orders.exists & (orders.state == machine.RETURN_ASKED)).sum(axis=1)),
        "recent_categories": _lists(machine.CATEGORIES, orders.category, orders.exists),
        "recent_tabs": _lists(machine.TABS, orders.tab, orders.exists),
    }


def _of_events(moments: Moments) -> dict[str, pa.Array]:
    names = events.kinds()
    n = len(moments.kind)
    recent = moments.happened & (moments.age <= COUNT_WINDOW_DAYS)
    cell = np.arange(n)[:, None] * len(names) + moments.kind
    counts = np.bincount(cell[recent], minlength=n * len(names)).reshape(n, len(names))
    last = moments.happened.sum(axis=1) - 1  # never −1: a session has telling moments
    newest = moments.kind[np.arange(n), last]
    hours = moments.age[np.arange(n), last] * 24.0
    return {
        "newest_event": _name(names, newest),
        "hours_since_newest_event": _number(hours),
        **{f"n_{name}_7d": _number(counts[:, i]) for i, name in enumerate(names)},
    }


def _name(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes.astype(np.int32)))


def _number(values: np.ndarray) -> pa.Array:
    """float32, rounded to hundredths; NaN becomes null."""
    return pa.array(np.round(values.astype(np.float64), 2).astype(np.float32), from_pandas=True)


def _lists(names: tuple[str, ...], codes: np.ndarray, kept: np.ndarray) -> pa.Array:
    """list<string> of the kept codes of each row."""
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _name(names, codes[kept]))
