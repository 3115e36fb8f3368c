"""What Prometheus can read of a run at Ray's metrics ports, beside Ray's own: `ray_rgalign_…`.

They are of a process, not of a run, and carry no tag that a user or a session could be told by.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge, Histogram

COUNTERS = {
    "rollout_units": "work units whose queries are written",
    "rollout_sessions": "sessions of those units",
    "rollout_deaths": "rollout workers that died or were silent for too long",
    "rollout_quarantined": "sessions set aside because every worker that read them died",
    "reward_queries": "latent queries that the reward model has judged",
    "learner_steps": "optimiser steps of an objective",
    "ranker_epochs": "epochs of a ranker's training",
    "serve_answers": "answers of the service",
    "serve_fallbacks": "requests that the reasoner, or the query store, was asked for and gave no answer to",
    "serve_overload": "requests that were refused because more were in work than are answered in time",
    "serve_feedback": "feedback that was acknowledged",
    "serve_lost_answers": "answers that could not be kept for feedback",
}
GAUGES = {
    "rollout_workers": "rollout workers at present, those that are starting included",
    "rollout_queue": "work units that wait for a worker",
    "ranker_gauc": "GAUC of a ranker on validation sessions after its last epoch",
    "serve_drift": "population stability index of a feature, of what is served against what was learned from",
}
HISTOGRAMS = {"serve_milliseconds": "time that a stage of an answer took"}
TAGS = {
    "learner_steps": ("objective",),
    "ranker_epochs": ("ranker",),
    "ranker_gauc": ("ranker",),
    "serve_answers": ("path", "variant"),
    "serve_fallbacks": ("reason",),
    "serve_drift": ("feature", "version"),
    "serve_milliseconds": ("stage",),
}
"""Of those that have some; every call gives all of them."""
BOUNDARIES_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


@cache
def counter(name: str) -> Counter:
    """One of `COUNTERS`; Prometheus sees ray_rgalign_<name>_total."""
    return Counter(f"rgalign_{name}", description=COUNTERS[name], tag_keys=TAGS.get(name))


@cache
def gauge(name: str) -> Gauge:
    """One of `GAUGES`; Prometheus sees ray_rgalign_<name>."""
    return Gauge(f"rgalign_{name}", description=GAUGES[name], tag_keys=TAGS.get(name))


@cache
def histogram(name: str) -> Histogram:
    """One of `HISTOGRAMS`; Prometheus sees ray_rgalign_<name>_bucket, _sum and _count."""
    return Histogram(f"rgalign_{name}", HISTOGRAMS[name], boundaries=BOUNDARIES_MS, tag_keys=TAGS.get(name))
