"""What Prometheus can read of a run at Ray's metrics ports, beside Ray's own: `ray_rgalign_…`.

They are of a process, not of a run, and carry no tag that a user, a session or a run could be told by.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge

COUNTERS = {
    "rollout_units": "work units whose queries are written",
    "rollout_sessions": "sessions of those units",
    "rollout_deaths": "rollout workers that died or were silent for too long",
    "rollout_quarantined": "sessions set aside because every worker that read them died",
    "reward_queries": "latent queries that the reward model has judged",
}
GAUGES = {
    "rollout_workers": "rollout workers at present, those that are starting included",
    "rollout_queue": "work units that wait for a worker",
}


@cache
def counter(name: str) -> Counter:
    """One of `COUNTERS`; Prometheus sees ray_rgalign_<name>_total."""
    return Counter(f"rgalign_{name}", description=COUNTERS[name])


@cache
def gauge(name: str) -> Gauge:
    """One of `GAUGES`; Prometheus sees ray_rgalign_<name>."""
    return Gauge(f"rgalign_{name}", description=GAUGES[name])
