"""What a run's report is made of: plain data that the loop fills in.

`report_page` makes one HTML file of it, `report_text` tables for the terminal and for files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

from rgalign_ray.evaluate import metric_names

ABSENT = "–"


def number(value: float, decimals: int = 4) -> str:
    """Four decimals, as small gains of GAUC need them; a value that is no number is a dash."""
    return f"{value:.{decimals}f}" if math.isfinite(value) else ABSENT


def signed(value: float, decimals: int = 4) -> str:
    """A difference with its sign, +0.0120 or −0.0030."""
    text = number(abs(value), decimals)
    return text if not math.isfinite(value) else f"{'−' if value < 0 else '+'}{text}"


def _short(text: str) -> str:
    """Without the nought before the point."""
    return re.sub(r"(?<!\d)0\.", ".", text)


class Part(BaseModel):
    """Base of the report's parts: plain, immutable, no unknown fields; survives a round trip through JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Estimate(Part):
    """A figure and its confidence interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return number(self.value)

    @property
    def interval(self) -> str:
        """The interval as text, or nothing."""
        return self._interval(number)

    @property
    def signed_interval(self) -> str:
        """The interval of a difference, or nothing."""
        return self._interval(signed)

    @property
    def short_interval(self) -> str:
        """The interval for narrow columns, .601 … .698, or nothing."""
        return self._interval(lambda bound: _short(number(bound, 3)))

    @property
    def short_signed_interval(self) -> str:
        """The interval of a difference for narrow columns, or nothing."""
        return self._interval(lambda bound: _short(signed(bound, 3)))

    def _interval(self, written: Callable[[float], str]) -> str:
        return "" if self.low is None or self.high is None else f"{written(self.low)} … {written(self.high)}"


class Row(Part):
    """One ranker, judged on the test sessions."""

    name: str
    metrics: dict[str, Estimate]
    """By metric; the first row's order is the order of the columns."""
    note: str = ""
    control: bool = False
    """A row that is there to unmask a gain (base rate, shuffled query, mean query), not to win."""
    seconds: float | None = None
    """Wall time of one seed: reading texts, training, scoring the test sessions."""


class Comparison(Part):
    """A paired difference between two rows."""

    better: str
    """The row expected to be the better one; the difference is it minus `worse`."""
    worse: str
    metric: str
    difference: Estimate
    separated: bool
    """Whether the interval excludes zero."""


class Example(Part):
    """One test session before and after alignment. All texts may come from users."""

    session: str
    """The session's text, as the reasoner reads it."""
    query_before: str
    query_after: str
    intents_before: list[str]
    """Titles of the top intents, best first."""
    intents_after: list[str]
    wanted: list[str]
    """Titles of the intents that count as right: the true need where the world knows it, else the clicked."""
    wanted_is: str = "clicked"
    """What `wanted` is: clicked, or true need."""


class RewardGate(Part):
    """Whether the reward tells a session's queries apart at all, before anything is built on it."""

    spread: float
    """Mean over sessions of the reward's standard deviation over the session's queries."""
    noise: float
    """The same unit: standard deviation of the difference between judges of other seeds, per judge."""
    reliability: float
    """Correlation of two judges within a session, hence the share of the variance that another repeats; below 0 where
    they contradict each other."""
    spread_by_session: list[float]
    noise_by_session: list[float]
    best_of_n: list[float]
    """Mean reward of the best of the first N valid queries, N = 1, 2, …; a diagnostic, not a servable gain."""
    best_of_n_judged: list[float] = []
    """The same choices in the eyes of a judge of another seed."""
    best_of_n_audited: list[float] = []
    """And of the auditor: another ranker, of other users, by another encoder."""
    valid_rate: float
    """Share of sampled queries that are neither empty nor cut nor looping."""


class QueryWorth(Part):
    """What the choice among the first N valid queries is truly worth, above the mean of the session's queries."""

    metric: str
    sessions: int
    by_reward: list[Estimate]
    """Chosen by the reward, N = 1, 2, …"""
    held_out: list[Estimate]
    """The same choice, for a ranker that had no say in it."""
    by_truth: list[Estimate]
    """Chosen by the truth itself: the most that any reward could reach."""
    null: Estimate
    """Without a query."""


class Diagnosis(Part):
    """Where an alignment is lost: the reward, the policy, its embedding, or the ranker that reads it."""

    name: str
    informative: float
    """What another judge sees in the best of N above the session's mean (the reward's unit)."""
    informative_error: float
    """Its standard error."""
    queries: int
    """Sessions whose latent query is known before and after."""
    queries_changed: float
    """Share of them that changed, the random numbers being the same."""
    moved: float
    """How far e(x) moved apart from one another, in units of the distance between two sessions."""
    common: float
    """Share of all squared movement of e(x) that is the same for every session, and counts nothing in `moved`."""
    read: float
    """What the retrained ranker is worth on the test sessions above what it is with every session's query exchanged
    with another user's, in `read_metric`."""
    read_metric: str = "GAUC"


class Written(Part):
    """The latent queries that several reasoners write for one test session. All texts may come from users."""

    session: str
    queries: dict[str, str | None]
    """By alignment; None where it wrote no valid one."""


class Curves(Part):
    """Lines of one plot over epochs or steps."""

    title: str
    x: str
    y: str
    lines: dict[str, list[float]]


class Breakdown(Part):
    """One metric of some rows, by group of sessions."""

    metric: str
    by: str
    """What the groups are, as region."""
    groups: list[str]
    rows: dict[str, list[Estimate | None]]
    """By row, an estimate a group; None where there is nothing to judge."""


class Calibration(Part):
    """How often candidates are clicked that a ranker expects to be, bin by bin, rarest first."""

    name: str
    expected: list[float]
    """Mean share of the session's clicks that softmax(scores) expects, by bin."""
    observed: list[float]


class Stage(Part):
    name: str
    seconds: float
    peak_mb: float | None = None
    """Most MiB that the driver and its Ray processes held at once, shared pages counted once."""


class Ingest(Part):
    sessions: int
    roles: dict[str, int]
    quarantined: dict[str, int] = {}
    """Rows set aside, by reason."""


class Report(Part):
    """Everything the page shows. Empty parts leave no trace on it."""

    title: str
    lead: str = ""
    """What this is about, in a sentence."""
    summary: list[str] = []
    """What was found, one sentence each."""
    facts: dict[str, str] = {}
    """The run in short: log, reasoner, sessions, seed …"""
    config: dict[str, Any] = {}
    """The resolved configuration, shown as YAML at the end."""
    metrics: dict[str, str] = {}
    """What each metric means, by name."""
    rows: list[Row]
    comparisons: list[Comparison] = []
    query_variance: dict[str, float] = {}
    """By ranker: share of the query tower's variance that lies between sessions, without the match of texts."""
    examples: list[Example] = []
    reward: RewardGate | None = None
    worth: QueryWorth | None = None
    diagnoses: list[Diagnosis] = []
    written: list[Written] = []
    curves: list[Curves] = []
    breakdowns: list[Breakdown] = []
    calibration: list[Calibration] = []
    stages: list[Stage] = []
    ingest: Ingest | None = None

    @property
    def columns(self) -> list[str]:
        """Metrics in the order in which the rows bring them."""
        return list(dict.fromkeys(metric for row in self.rows for metric in row.metrics))

    @property
    def telling(self) -> list[str]:
        return metric_names.telling(self.columns)

    @property
    def pairs(self) -> dict[tuple[str, str], dict[str, Comparison]]:
        """Comparisons of rows, by (better, worse) and then by metric."""
        found: dict[tuple[str, str], dict[str, Comparison]] = {}
        columns = self.columns
        for it in self.comparisons:
            if it.metric in columns:
                found.setdefault((it.better, it.worse), {})[it.metric] = it
        return found

    @property
    def others(self) -> list[Comparison]:
        """Comparisons of something else than rows: their metric is none of the table's."""
        columns = self.columns
        return [it for it in self.comparisons if it.metric not in columns]

    def best(self, metric: str) -> float | None:
        """The highest value among the rows that compete; None where fewer than two do."""
        values = [row.metrics[metric].value for row in self.rows if metric in row.metrics and not row.control]
        finite = [value for value in values if math.isfinite(value)]
        return max(finite) if len(finite) > 1 else None
