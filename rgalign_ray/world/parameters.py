"""Every constant of the simulated shop, stated once.

They were chosen for the plain sense of the scenario and for a share of sessions with a click near 0.3,
before anything was trained on the world. Nothing here may be tuned to what a learner achieves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parameters:
    # Users
    activity_skew: float = 1.5
    """User of a session: floor(users · u^skew), so that some come often."""
    trait_share: float = 0.3
    """Share of users with each hidden trait (impatient, thrifty, returner)."""
    trait_noise: float = 0.15
    """Spread of the typed rates through which a trait shows."""
    new_user_days: float = 45.0
    campaign_every_days: int = 14
    campaign_days: int = 3

    # Orders
    orders_seen: int = 4
    """Newest orders of a user that a session looks at."""
    order_gap_days: float = 13.0
    """Median days between two orders of a user; spread is log-normal."""
    never_paid: float = 0.08
    pays_late: float = 0.15
    slow_packing: float = 0.18
    cancelled_by_user: float = 0.08
    delayed: float = 0.3
    """Orders whose transit gains 2 days and an exponential of mean `delay_days`."""
    delay_days: float = 6.0
    failed_attempt: float = 0.15
    returned: float = 0.15
    returned_by_returners: float = 0.35
    stuck_days: float = 7.0
    """Days in 'To Receive' after which a parcel counts as stuck."""
    slow_seller_days: float = 2.5

    # Need
    prior_spread: float = 1.0
    """Standard deviation of the log popularity of an intent."""
    region_spread: float = 0.4
    """Standard deviation of a region's shift of it."""
    situation_gain: float = 4.0
    """Log odds that a situation adds to the needs it makes likely, where typed features carry everything."""

    # Evidence: moments before the entry
    telling_moments: int = 3
    """Moments of a session that concern its need; each is put into text with probability `text_share`,
    else into a typed event. This is what `text_share` divides."""
    truth: float = 0.75
    """Probability that a telling moment speaks of the need and not of something else."""
    first_signal: float = 0.65
    """Probability of the commoner of a need's two typed events."""
    other_events: int = 5
    """Most typed events about other things (uniform from 1)."""
    other_texts: int = 2
    """Most texts about other things (uniform from 1)."""
    telling_age_days: float = 0.15
    other_age_days: float = 3.0
    """Mean ages of moments at the entry (exponential)."""
    oldest_event_days: float = 14.0
    newest_event_days: float = 30 / 86400
    """No event is younger than half a minute at the entry."""
    channels: tuple[float, ...] = (0.4, 0.25, 0.35)
    """Probabilities of search, chat, notice. Not of the need: else the kind of a text would be a typed signal."""

    # Exposure
    slate_size: int = 3
    uniform_share: float = 0.05
    old_ranker_popularity: float = 1.5
    """How sharply the old ranker follows log popularity, and the noise with which it knows it."""
    old_ranker_noise: float = 0.3
    old_ranker_gain: float = 3.5
    """What a situation adds to the old ranker's logit, for the links it knows."""
    old_ranker_blind: float = 0.2
    """Share of the links between situations and needs that it does not know."""

    # Click: examination(position) · sigmoid(bias + user + slope · relevance + bait) + floor
    examination_decay: float = 0.35
    """Position model: examination(position) = 1 / (1 + decay · position), position from 0."""
    goes_on_after_skip: float = 0.8
    """Cascade model: probability of reading on after an intent that was not clicked."""
    goes_on_after_click: float = 0.6
    """Cascade model: the same after a click that did not help; the others ask a human or leave. Less than after a
    skip, yet enough that a more relevant intent in the same place never does harm."""
    click_bias: float = -3.2
    relevance_slope: float = 5.2
    user_spread: float = 0.6
    bait: float = 1.2
    """What a clickbait intent adds to the click's logit and not to the resolution."""
    click_floor: float = 0.01
    resolution: tuple[float, float, float] = (0.03, 0.4, 0.9)
    """Probability that a click resolves the need, at relevance 0, 0.5 and 1; linear in between."""


PARAMETERS = Parameters()

FIRST_DAY = np.datetime64("2026-01-05")
"""A Monday."""

REGIONS = ("ID", "MY", "PH", "SG", "TH", "TW", "VN", "BR")
REGION_SHARES = (0.26, 0.10, 0.14, 0.05, 0.14, 0.08, 0.13, 0.10)
REGION_EXTRA_DAYS = (1.0, 0.5, 1.5, 0.0, 0.5, 0.0, 0.5, 2.0)
"""Transit beyond the standard, by region."""
