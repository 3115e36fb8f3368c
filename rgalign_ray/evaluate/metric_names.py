"""What metrics are called and mean, and which of them a report's claims are about."""

from __future__ import annotations

from collections.abc import Sequence

from rgalign_ray.config import Evaluate

SHOWN = "GAUC shown"
TRUE_QUALITY = ("need Recall", "true CTR")
"""Metrics, by what they begin with, that claims are about where the simulated shop's truth is known,"""
BESIDE = ("resolved",)
"""and what must not fall."""
MEANINGS = {
    "GAUC": "Mean over sessions of the AUC of clicked against unclicked candidates, weighted by candidates.",
    "Recall@{k}": "Share of a session's clicked intents among the first {k}; sessions with a click.",
    "NDCG@{k}": "Discounted gain of the clicked intents among the first {k}, relative to the best possible.",
    "need Recall@{k}": "Share of sessions whose true need is among the first {k} (simulated shop only).",
    "true CTR@{k}": "Expected probability of a click when the first {k} are shown, by the shop's own click model.",
    "resolved@{k}": "The same for a click that resolves the need.",
    SHOWN: "GAUC among the candidates that were shown, so that imitating what chose them is worth nothing.",
    "GAUC uniform": "GAUC on the sessions whose slate was drawn uniformly, which owe nothing to the old ranker.",
}


def meanings(settings: Evaluate) -> dict[str, str]:
    """What each metric means, by its name in the table, in their order of importance: GAUC is of what `rank_by` ranks
    by.
    """
    named = {name.format(k=settings.k): text.format(k=settings.k) for name, text in MEANINGS.items()}
    return {SHOWN: named[SHOWN]} | named if settings.rank_by == "click" else named


def telling(metrics: Sequence[str]) -> list[str]:
    """Of metrics in their order of importance those that claims are about: the true quality where it is known, else the
    first.
    """
    return [name for name in metrics if name.startswith(TRUE_QUALITY)] or list(metrics[:1])


def in_short(metrics: Sequence[str]) -> list[str]:
    """Of metrics in their order of importance those in which a terminal tells differences: where the true quality is
    known that, what stands beside it, and the first that a log gives; else all.
    """
    true = [name for name in metrics if name.startswith((*TRUE_QUALITY, *BESIDE))]
    return list(dict.fromkeys([*metrics[:1], *true])) if true else list(metrics)
