"""The report's plots, as inline SVG whose colours follow the page's light or dark scheme.

matplotlib writes fixed colours. Each stands here for a role (ink, grid, series …) and is replaced by the
CSS variable of that role, so that the page's style sheet decides, and text stays text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rgalign_ray.evaluate.report import (
    Breakdown,
    Calibration,
    Comparison,
    Curves,
    QueryWorth,
    Report,
    RewardGate,
    Row,
    Stage,
)

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707")
ROLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
FAR = 3.0
"""Differences that are so many times as large as nearly all of them are told in figures."""
WIDTH = 4.6
"""Inches; narrow enough that a phone shows the text at its own size."""


def all_of(report: Report) -> dict[str, list[Markup]]:
    """The plots by section of the page; a section without data has none."""
    gate = report.reward
    return {
        "headline": [intervals(metric, report.rows) for metric in report.columns],
        "differences": [differences(metric, report.comparisons) for metric in report.telling],
        "reward": [
            *([reward_spread(gate), best_of_n(gate)] if gate else []),
            *([true_best_of_n(report.worth)] if report.worth else []),
        ],
        "curves": [curves(it) for it in report.curves if it.lines],
        "looks": [
            *(quality_against_time(metric, report.rows) for metric in _timed(report)),
            *(breakdown(it) for it in report.breakdowns),
            *([calibration(report.calibration)] if report.calibration else []),
        ],
        "stages": [stage_times(report.stages)] if report.stages else [],
    }


def intervals(metric: str, rows: Sequence[Row]) -> Markup:
    """A dot and its interval per row; controls are hollow."""
    shown = [row for row in rows if metric in row.metrics and math.isfinite(row.metrics[metric].value)]
    shown.sort(key=lambda row: row.control)

    def draw(axes: Axes) -> None:
        for position, row in enumerate(shown):
            it = row.metrics[metric]
            colour = MUTED if row.control else SERIES[0]
            if it.low is not None and it.high is not None:
                axes.hlines(position, it.low, it.high, color=colour, linewidth=1.6)
            fill = "none" if row.control else colour
            axes.plot(it.value, position, "o", markersize=5.5, markeredgecolor=colour, markerfacecolor=fill)
        axes.set_yticks(range(len(shown)), [_short(row.name) for row in shown])
        for label, row in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_color(MUTED if row.control else INK)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(metric)

    return _svg(f"headline {metric}", draw, height=0.7 + 0.26 * len(shown))


def differences(metric: str, comparisons: Sequence[Comparison]) -> Markup:
    """A dot and its interval per paired difference; those whose interval holds zero are hollow.

    Where a few stand far off, as a ceiling does, the others decide the scale, and those are told in figures.
    """
    shown = [it for it in comparisons if it.metric == metric and math.isfinite(it.difference.value)]

    far = FAR * _quantile([abs(it.difference.value) for it in shown], 0.9)
    near = [it.difference for it in shown if abs(it.difference.value) <= far]
    limit = 1.1 * max((abs(end) for it in near for end in (it.low, it.value, it.high) if end), default=1.0)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for position, found in enumerate(shown):
            it = found.difference
            colour = SERIES[0] if found.separated else MUTED
            if abs(it.value) > far:
                right = it.value > 0
                told = f"{it.value:+.3f} →" if right else f"← {it.value:+.3f}"
                axes.text(limit if right else -limit, position, told, ha="right" if right else "left", va="center")
                continue
            if it.low is not None and it.high is not None:
                axes.hlines(position, it.low, it.high, color=colour, linewidth=1.6)
            fill = colour if found.separated else "none"
            axes.plot(it.value, position, "o", markersize=5.5, markeredgecolor=colour, markerfacecolor=fill)
        names = [f"{_short(it.better, 60)}\n− {_short(it.worse, 60)}" for it in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=6.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(-limit, limit)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"{metric}, difference")

    return _svg(f"differences {metric}", draw, height=0.7 + 0.34 * len(shown))


def reward_spread(gate: RewardGate) -> Markup:
    """How far a session's queries lie apart in reward, against how far two judges do."""

    def draw(axes: Axes) -> None:
        lines = (("between a session's queries", gate.spread_by_session), ("between judges", gate.noise_by_session))
        top = _quantile([value for _, values in lines for value in values], 0.98)
        for colour, (label, values) in zip(SERIES, lines, strict=False):
            kept = [min(value, top) for value in values if math.isfinite(value)]
            axes.hist(kept, bins=24, range=(0, top), histtype="stepfilled", color=colour, alpha=0.25, edgecolor="none")
            axes.hist(kept, bins=24, range=(0, top), histtype="step", color=colour, linewidth=1.4, label=label)
        axes.set(xlabel="standard deviation of the reward", ylabel="sessions", title="Signal against noise")
        axes.grid(axis="x", visible=False)
        axes.legend()

    return _svg("reward spread", draw)


def best_of_n(gate: RewardGate) -> Markup:
    """Mean reward of the best of the first N queries, as its judge sees it and as others do.

    Where the first line rises and the others do not, what is chosen is the judge's own error.
    """
    seen = {
        "the reward": gate.best_of_n,
        "a judge of another seed": gate.best_of_n_judged,
        "the auditor": gate.best_of_n_audited,
    }

    def draw(axes: Axes) -> None:
        for (label, values), colour in zip(seen.items(), SERIES, strict=False):
            if values:
                axes.plot(range(1, len(values) + 1), values, "o-", color=colour, markersize=4, label=label)
        axes.set(xlabel="valid queries, N", ylabel="mean reward over the session's mean", title="Best of N, seen by")
        axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg("best of n", draw)


def true_best_of_n(worth: QueryWorth) -> Markup:
    """True value of the best of the first N queries: as the reward chooses, and as the truth itself would."""
    lines = {
        "the reward chooses": worth.by_reward,
        "the same, for another ranker": worth.held_out,
        "the truth chooses": worth.by_truth,
    }

    def draw(axes: Axes) -> None:
        for (label, estimates), colour in zip(lines.items(), SERIES, strict=False):
            numbers = range(1, len(estimates) + 1)
            axes.plot(numbers, [it.value for it in estimates], "o-", color=colour, markersize=4, label=label)
            known = [(n, it.low, it.high) for n, it in zip(numbers, estimates, strict=True) if it.low is not None]
            if known:
                at, low, high = zip(*known, strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(worth.null.value, color=MUTED, linestyle="--", linewidth=1, label="no query")
        axes.set(
            xlabel="valid queries, N", ylabel=f"{worth.metric} over the session's mean", title="Best of N, in truth"
        )
        axes.figure.legend(loc="outside lower center", ncols=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg("true best of n", draw, height=3.3)


def curves(it: Curves) -> Markup:
    """Lines over epochs or steps, counted from 1."""

    def draw(axes: Axes) -> None:
        for number, (label, values) in enumerate(it.lines.items()):
            marker = "o" if len(values) <= 30 else ""
            dashes = "-" if number < len(SERIES) else "--"
            axes.plot(
                range(1, len(values) + 1),
                values,
                dashes,
                marker=marker,
                markersize=3,
                color=SERIES[number % len(SERIES)],
                label=_short(label),
            )
        axes.set(xlabel=it.x, ylabel=it.y, title=it.title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(it.lines) > 1:
            axes.legend()

    return _svg(f"curves {it.title}", draw)


def quality_against_time(metric: str, rows: Sequence[Row]) -> Markup:
    """What a row costs and what it gives; controls are hollow."""
    shown = [row for row in rows if row.seconds and metric in row.metrics and math.isfinite(row.metrics[metric].value)]

    def draw(axes: Axes) -> None:
        for row in shown:
            assert row.seconds is not None, "rows without a time are not shown"
            place = (row.seconds, row.metrics[metric].value)
            colour = MUTED if row.control else SERIES[0]
            axes.plot(*place, "o", markersize=5, color=colour, markerfacecolor="none" if row.control else colour)
            axes.annotate(_short(row.name), place, xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.margins(x=0.25, y=0.08)
        axes.set(
            xlabel="seconds a seed: reading, training, scoring", ylabel=metric, title=f"{metric} against wall time"
        )

    return _svg(f"time {metric}", draw, height=3.4)


def breakdown(it: Breakdown) -> Markup:
    """A dot and its interval for each row in each group."""

    def draw(axes: Axes) -> None:
        step = 0.7 / max(len(it.rows), 1)
        for number, (label, estimates) in enumerate(it.rows.items()):
            colour = SERIES[number % len(SERIES)]
            places = [group + (number - (len(it.rows) - 1) / 2) * step for group in range(len(it.groups))]
            kept = [(place, e) for place, e in zip(places, estimates, strict=True) if e is not None]
            axes.plot(
                [e.value for _, e in kept], [p for p, _ in kept], "o", color=colour, markersize=3.5, label=_short(label)
            )
            for place, e in kept:
                if e.low is not None and e.high is not None:
                    axes.plot([e.low, e.high], [place, place], color=colour, linewidth=1.2)
        axes.set_yticks(range(len(it.groups)), [_short(group) for group in it.groups])
        axes.set_ylim(len(it.groups) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=it.metric, title=f"{it.metric} by {it.by}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)

    return _svg(f"{it.metric} by {it.by}", draw, height=1.4 + 0.34 * len(it.groups))


def calibration(lines: Sequence[Calibration]) -> Markup:
    """Observed against expected shares of clicks; on the diagonal a score means what it says."""

    def draw(axes: Axes) -> None:
        for number, it in enumerate(lines):
            seen = [(e, o) for e, o in zip(it.expected, it.observed, strict=True) if e > 0 and o > 0]
            if seen:
                expected, observed = zip(*seen, strict=True)
                axes.plot(
                    expected, observed, "o-", markersize=3, color=SERIES[number % len(SERIES)], label=_short(it.name)
                )
        low = min((e for it in lines for e in it.expected if e > 0), default=1e-3)
        axes.plot([low, 1], [low, 1], ":", color=MUTED, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        axes.set(xlabel="expected share of the clicks", ylabel="observed share", title="Calibration")
        axes.legend()

    return _svg("calibration", draw, height=3.4)


def _plain(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: matplotlib's own labels are formulas, which are not parsed here."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _timed(report: Report) -> list[str]:
    """Metrics worth holding against wall time: those of the first and of the true quality."""
    if not any(row.seconds for row in report.rows):
        return []
    return [metric for metric in report.columns if metric == report.columns[0] or metric.startswith("true")]


def stage_times(stages: Sequence[Stage]) -> Markup:
    """Wall time by stage, in the order of the run; stages taken over from an earlier run are pale."""

    def draw(axes: Axes) -> None:
        for position, stage in enumerate(stages):
            axes.barh(position, stage.seconds, height=0.62, color=SERIES[0])
            axes.annotate(
                f"{stage.seconds:,.0f} s",
                (stage.seconds, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=8,
            )
        axes.set_yticks(range(len(stages)), [_short(stage.name) for stage in stages])
        for label in axes.get_yticklabels():
            label.set_color(INK)
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds", title="Wall time by stage")

    return _svg("stages", draw, height=0.8 + 0.24 * len(stages))


def _svg(name: str, draw: Callable[[Axes], None], height: float = 2.7) -> Markup:
    """Draws on fresh axes and returns the SVG element; equal data give equal text.

    `name` keeps the element ids of several plots on one page apart.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser's fonts draw the text; what matplotlib's own lack does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name).strip("-").lower()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, variable in ROLES.items():
        text = text.replace(colour, f"var({variable})")
    # matplotlib escapes the texts it draws; the rest of the element is its own.
    return Markup(text)


def _short(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the finite `values` lie; 1 where there is none above zero."""
    finite = sorted(value for value in values if math.isfinite(value))
    return (finite[int(share * (len(finite) - 1))] if finite else 0.0) or 1.0
