"""Users: profile, hidden traits, and how these show in typed features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rgalign_ray.world.draws import Draws, pick
from rgalign_ray.world.parameters import PARAMETERS, REGION_SHARES

TIERS = ("bronze", "silver", "gold", "platinum")
TIER_SHARES = (0.5, 0.28, 0.15, 0.07)
PAYMENT_METHODS = ("card", "wallet", "bank_transfer", "cash_on_delivery", "pay_later")
PAYMENT_SHARES = (0.3, 0.28, 0.16, 0.16, 0.1)
PLATFORMS = ("android", "ios", "web")
PLATFORM_SHARES = (0.62, 0.28, 0.10)
APP_VERSIONS = ("8.1", "8.2", "8.3", "8.4")
APP_SHARES = (0.1, 0.2, 0.3, 0.4)
ACQUISITIONS = ("organic", "friend", "ads", "livestream")
ACQUISITION_SHARES = (0.4, 0.25, 0.25, 0.1)
CITY_SIZES = ("village", "town", "city", "metropolis")
CITY_SHARES = (0.15, 0.3, 0.35, 0.2)


@dataclass(frozen=True)
class Users:
    """Arrays [n], one entry per row; codes index the tuples of this module."""

    number: np.ndarray
    region: np.ndarray
    tier: np.ndarray
    platform: np.ndarray
    app_version: np.ndarray
    acquisition: np.ndarray
    city_size: np.ndarray
    default_payment: np.ndarray
    has_payment: np.ndarray
    """bool [n, methods]"""
    tenure_at_start: np.ndarray
    """Days since registration on the first day of the log."""
    order_gap: np.ndarray
    """Days between two orders."""
    order_phase: np.ndarray
    impatient: np.ndarray
    thrifty: np.ndarray
    returner: np.ndarray
    complaint_rate: np.ndarray
    voucher_share: np.ndarray
    return_rate: np.ndarray
    cancel_rate: np.ndarray
    cards_saved: np.ndarray
    bias: np.ndarray
    """b_user of the click model."""


def ids(draws: Draws, number: np.ndarray) -> list[str]:
    return [f"u{key:016x}" for key in draws.keys("user id", number).tolist()]


def look_up(draws: Draws, number: np.ndarray) -> Users:
    """The users of these numbers (uint64 [n])."""
    p = PARAMETERS
    u = draws.uniform("user", number, 20)
    z = draws.normal("user", number, 7)
    default = pick(u[:, 6], PAYMENT_SHARES)
    has_payment = u[:, 7:12] < 0.35
    has_payment[np.arange(len(number)), default] = True
    impatient, thrifty, returner = (u[:, i] < p.trait_share for i in (12, 13, 14))
    gap = np.clip(p.order_gap_days * np.exp(0.6 * z[:, 0]), 2.0, 45.0)
    return Users(
        number=number,
        region=pick(u[:, 0], REGION_SHARES),
        tier=pick(u[:, 1], TIER_SHARES),
        platform=pick(u[:, 2], PLATFORM_SHARES),
        app_version=pick(u[:, 3], APP_SHARES),
        acquisition=pick(u[:, 4], ACQUISITION_SHARES),
        city_size=pick(u[:, 5], CITY_SHARES),
        default_payment=default,
        has_payment=has_payment,
        tenure_at_start=np.clip(300.0 * np.exp(1.2 * z[:, 1]), 1.0, 3000.0),
        order_gap=gap,
        order_phase=u[:, 15] * gap,
        impatient=impatient,
        thrifty=thrifty,
        returner=returner,
        complaint_rate=_rate(0.1, impatient, z[:, 2]),
        voucher_share=_rate(0.2, thrifty, z[:, 3]),
        return_rate=_rate(0.1, returner, z[:, 4]),
        cancel_rate=_rate(0.1, np.zeros(len(number), bool), z[:, 5]),
        cards_saved=np.floor(u[:, 16] * 4) * has_payment[:, 0],
        bias=p.user_spread * z[:, 6],
    )


def _rate(base: float, trait: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.clip(base + 0.35 * trait + PARAMETERS.trait_noise * noise, 0.0, 1.0)
