"""A run's report: what it is made of, the page that shows it, and its headline for the terminal.

`Report` is plain data that the loop fills in. `write_report` makes one HTML file of it that loads nothing
from anywhere; `headline` and `examples` show the same figures in the terminal.
"""

from __future__ import annotations

import csv as csvfile
import io
import math
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from rgalign_ray import __version__, storage
from rgalign_ray.progress import clock

ABSENT = "–"
TRUE_QUALITY = ("need Recall", "true CTR")
"""Metrics, by what they begin with, that the simulated shop's truth gives."""


class Part(BaseModel):
    """Base of the report's parts: plain, immutable, no unknown fields; survives a round trip through JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Estimate(Part):
    """A figure and its confidence interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return _number(self.value)

    @property
    def interval(self) -> str:
        """The interval as text, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{_number(self.low)} … {_number(self.high)}"


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
    """Share of the within-session variance that another judge repeats, in [0, 1]."""
    spread_by_session: list[float]
    noise_by_session: list[float]
    best_of_n: list[float]
    """Mean reward of the best of the first N queries, N = 1, 2, …; a diagnostic, not a servable gain."""
    best_of_n_judged: list[float] = []
    """The same choices in the eyes of a judge of another seed."""
    best_of_n_audited: list[float] = []
    """And of the auditor: another ranker, of other users, by another encoder."""
    valid_rate: float
    """Share of sampled queries that are neither empty nor cut nor looping."""


class QueryWorth(Part):
    """What the choice among the first N queries is truly worth, above the mean of the session's queries."""

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
    """GAUC of the retrained ranker on the test sessions above that with every session's query exchanged with another
    user's."""


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
    """By ranker: share of the query tower's variance that lies between sessions, in [0, 1]."""
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
        return telling(self.columns)


def telling(metrics: Sequence[str]) -> list[str]:
    """Of a report's metrics those that its claims are about: the true quality where it is known, else the first."""
    return [name for name in metrics if name.startswith(TRUE_QUALITY)] or list(metrics[:1])


def write_report(uri: str, report: Report) -> str:
    """Writes the report as one self-contained HTML file at `uri`, and returns `uri`.

    Every text is escaped; plots are inline SVG; the page asks the network for nothing.
    """
    storage.write_bytes(uri, render(report).encode())
    return uri


def render(report: Report) -> str:
    """The report as the text of one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from rgalign_ray.evaluate import plots

    environment = Environment(
        loader=PackageLoader("rgalign_ray", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, percent=_percent, clock=clock, signed=_signed, signed_interval=_signed_interval
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        version=__version__,
        absent=ABSENT,
        best={metric: _best(report, metric) for metric in report.columns},
        config=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True) if report.config else "",
        plots=plots.all_of(report),
    )


def headline(report: Report) -> Table:
    """The headline as a table for the terminal: rows by metric, intervals below, controls last, notes under it."""
    notes = "\n".join(f"{escape(row.name)}: {escape(row.note)}" for row in report.rows if row.note)
    table = Table(
        title=escape(report.title),
        title_justify="left",
        title_style="bold",
        header_style="bold",
        caption=notes or None,
        caption_justify="left",
    )
    table.add_column("ranker", min_width=18)
    for metric in report.columns:
        table.add_column(escape(metric), justify="right")
    best = {metric: _best(report, metric) for metric in report.columns}
    rows = sorted(report.rows, key=lambda row: row.control)
    for position, row in enumerate(rows):
        cells = [_cell(row, metric, best[metric]) for metric in report.columns]
        last_rival = position + 1 < len(rows) and rows[position + 1].control and not row.control
        table.add_row(
            escape(row.name),
            *cells,
            style="dim" if row.control else None,
            end_section=last_rival,
        )
    return table


def markdown(report: Report) -> str:
    """Rows and comparisons as Markdown tables."""
    lines = [f"# {report.title}", "", *_table("ranker", report.columns)]
    for row in report.rows:
        lines.append(_line([row.name, *(_with_interval(row.metrics.get(metric)) for metric in report.columns)]))
    if report.comparisons:
        lines += ["", *_table("difference", ["metric", "value", "interval", "claim"])]
    for it in report.comparisons:
        verdict = "separated" if it.separated else "not separated"
        pair = f"{it.better} − {it.worse}"
        lines.append(_line([pair, it.metric, _signed(it.difference.value), _signed_interval(it.difference), verdict]))
    lines += ["", *(f"- {name}: {value}" for name, value in report.facts.items())]
    return "\n".join(lines) + "\n"


def _with_interval(it: Estimate | None) -> str:
    if it is None:
        return ABSENT
    return f"{it} ({it.interval})" if it.interval else str(it)


def _table(first: str, others: list[str]) -> list[str]:
    """The head of a Markdown table: the first column to the left, the others to the right."""
    return [_line([first, *others]), _line(["---", *("---:" for _ in others)])]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def csv(report: Report) -> str:
    """A line per row and metric: ranker, control, metric, value, low, high."""
    out = io.StringIO()
    writer = csvfile.writer(out, lineterminator="\n")
    writer.writerow(["ranker", "control", "metric", "value", "low", "high"])
    for row in report.rows:
        for metric, it in row.metrics.items():
            writer.writerow([row.name, row.control, metric, it.value, it.low, it.high])
    return out.getvalue()


def examples(report: Report) -> RenderableType:
    """The example sessions, one panel each, with the latent query and top intents before and after."""
    return Group(*(_panel(number, example) for number, example in enumerate(report.examples, start=1)))


def comparisons(report: Report) -> RenderableType:
    """The paired differences, one line each; one whose interval holds zero is called not separated."""
    table = Table.grid(padding=(0, 2))
    for it in report.comparisons:
        verdict = "" if it.separated else "[yellow]not separated[/]"
        table.add_row(
            f"{escape(it.metric)}: {escape(it.better)} − {escape(it.worse)}",
            _signed(it.difference.value),
            f"[dim]{_signed_interval(it.difference)}[/]",
            verdict,
        )
    return table


def _signed(value: float) -> str:
    """A difference with its sign, +0.012 or −0.003."""
    text = _number(abs(value))
    return text if not math.isfinite(value) else f"{'−' if value < 0 else '+'}{text}"


def _signed_interval(estimate: Estimate) -> str:
    """The interval of a difference, or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_signed(estimate.low)} … {_signed(estimate.high)}"


def _panel(number: int, example: Example) -> Panel:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    lines.add_row("session", escape(example.session))
    lines.add_row(escape(example.wanted_is), escape(", ".join(example.wanted)) or ABSENT)
    for when, query, intents in (
        ("before", example.query_before, example.intents_before),
        ("after", example.query_after, example.intents_after),
    ):
        lines.add_row(when, f"“{escape(query)}”")
        lines.add_row("", " · ".join(_mark(title, example.wanted) for title in intents))
    return Panel(lines, title=f"example {number}", title_align="left", border_style="dim")


def _mark(title: str, wanted: list[str]) -> str:
    return f"[green]✓ {escape(title)}[/]" if title in wanted else escape(title)


def _cell(row: Row, metric: str, best: float | None) -> str:
    estimate = row.metrics.get(metric)
    if estimate is None:
        return ABSENT
    value = f"[bold]{estimate}[/]" if not row.control and estimate.value == best else str(estimate)
    if estimate.low is None or estimate.high is None:
        return value
    low, high = (f"{bound:.3f}".replace("0.", ".", 1) for bound in (estimate.low, estimate.high))
    return f"{value}\n[dim]{low}–{high}[/]"


def _best(report: Report, metric: str) -> float | None:
    """The highest value among the rows that compete; None where fewer than two do."""
    values = [row.metrics[metric].value for row in report.rows if metric in row.metrics and not row.control]
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) if len(finite) > 1 else None


def _number(value: float) -> str:
    """Four decimals, as small gains of GAUC need them; a value that is no number is a dash."""
    return f"{value:.4f}" if math.isfinite(value) else ABSENT


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else ABSENT
