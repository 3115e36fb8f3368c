"""What a user needs, given state, traits and time.

log p(need | x) = log popularity + (1 − text_share) · (region shift + gain · number of active situations
that make the need likely) + const. At text_share = 1 the need does not depend on anything typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from rgalign_ray.world import kb
from rgalign_ray.world import orders as machine
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.orders import Orders
from rgalign_ray.world.parameters import PARAMETERS, REGIONS
from rgalign_ray.world.users import Users

SITUATIONS = (
    "unpaid",
    "preparing",
    "slow_seller",
    "shipping",
    "late",
    "stuck",
    "arriving",
    "just_delivered",
    "delivered_long",
    "return_open",
    "refund_waiting",
    "refunded",
    "cancelled",
    "browsing",
    "card_trouble",
    "campaign",
    "new_user",
    "premium",
    "impatient",
    "thrifty",
    "returner",
)


@cache
def links() -> np.ndarray:
    """float64 [situations, I]: 1 where the situation makes the need likely."""
    matrix = np.zeros((len(SITUATIONS), len(kb.entries())))
    for i, intent in enumerate(kb.entries()):
        for situation in intent.when:
            matrix[SITUATIONS.index(situation), i] = 1.0
    matrix.setflags(write=False)
    return matrix


def situations(users: Users, orders: Orders, t: np.ndarray, payment_failures: np.ndarray) -> np.ndarray:
    """bool [n, situations] at times t (days since the first day), read off the newest order, user and clock."""
    p = PARAMETERS
    exists, state, in_state = orders.exists[:, 0], orders.state[:, 0], orders.days_in_state[:, 0]
    tab, in_tab = orders.tab[:, 0], orders.days_in_tab[:, 0]
    receiving = exists & (tab == machine.TO_RECEIVE)
    shipping_soon = exists & (tab == machine.TO_SHIP)
    delivered = exists & (state == machine.DELIVERED)
    late = receiving & (orders.days_late[:, 0] > 0)
    returning = exists & (state == machine.RETURN_ASKED)
    settled = ~exists | (delivered & (in_state > 4.0)) | (tab == machine.CANCELLED_TAB) | (state == machine.REFUNDED)
    active = {
        "unpaid": exists & (state == machine.PLACED),
        "preparing": shipping_soon & (in_tab <= p.slow_seller_days),
        "slow_seller": shipping_soon & (in_tab > p.slow_seller_days),
        "shipping": receiving & ~late & (state != machine.OUT),
        "late": late,
        "stuck": receiving & (in_tab >= p.stuck_days),
        "arriving": receiving & (state == machine.OUT),
        "just_delivered": delivered & (in_state <= 4.0),
        "delivered_long": delivered & (in_state > 4.0),
        "return_open": returning,
        "refund_waiting": returning & (in_state > 2.0),
        "refunded": exists & (state == machine.REFUNDED),
        "cancelled": exists & (state == machine.CANCELLED),
        "browsing": settled,
        "card_trouble": payment_failures >= 2,
        "campaign": days_to_campaign(t) == 0,
        "new_user": users.tenure_at_start + t < p.new_user_days,
        "premium": users.tier >= 2,
        "impatient": users.impatient,
        "thrifty": users.thrifty,
        "returner": users.returner,
    }
    return np.stack([active[name] for name in SITUATIONS], axis=1)


def days_to_campaign(t: np.ndarray) -> np.ndarray:
    """Whole days until the next campaign begins; 0 while one runs."""
    p = PARAMETERS
    phase = np.floor(t).astype(int) % p.campaign_every_days
    begin = p.campaign_every_days - p.campaign_days
    return np.maximum(begin - phase, 0)


@dataclass(frozen=True)
class NeedModel:
    """p(need | x) of one world."""

    popularity: np.ndarray
    """[I], log."""
    region_shift: np.ndarray
    """[regions, I], log."""
    cold: np.ndarray
    """bool [I]: intents that do not occur before the test period."""
    text_share: float

    @classmethod
    def draw(cls, draws: Draws, text_share: float, cold_share: float) -> NeedModel:
        size = len(kb.entries())
        each = np.arange(size, dtype=np.uint64)
        order = draws.uniform("cold", each, 1)[:, 0].argsort()
        cold = np.zeros(size, dtype=bool)
        cold[order[: round(cold_share * size)]] = True
        return cls(
            popularity=PARAMETERS.prior_spread * draws.normal("popularity", each, 1)[:, 0],
            region_shift=PARAMETERS.region_spread * draws.normal("region", each, len(REGIONS)).T,
            cold=cold,
            text_share=text_share,
        )

    def base(self, allow_cold: bool) -> np.ndarray:
        """Weights [I] of the needs where nothing is known: their popularity, 0 for cold ones unless allowed."""
        return np.exp(self.popularity) * (allow_cold | ~self.cold)

    def weights(self, active: np.ndarray, region: np.ndarray, allow_cold: bool, typed_share: float) -> np.ndarray:
        """Weights [n, I], proportional to p(need | x), with `typed_share` in place of 1 − text_share."""
        pull = PARAMETERS.situation_gain * (active.astype(np.float64) @ links()) + self.region_shift[region]
        return self.base(allow_cold) * np.exp(typed_share * pull)
