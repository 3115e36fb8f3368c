"""A report as tables: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv as csvfile
import io

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from rgalign_ray.evaluate import metric_names
from rgalign_ray.evaluate.report import ABSENT, Comparison, Estimate, Example, Report, Row, signed

SEPARATED = "*"
"""Behind a difference whose interval excludes zero."""


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
    best = {metric: report.best(metric) for metric in report.columns}
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
        lines.append(_line([pair, it.metric, signed(it.difference.value), it.difference.signed_interval, verdict]))
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
    """The paired differences as a table for the terminal: pairs by metric, intervals below. A star stands where the
    interval excludes zero.
    """
    pairs = report.pairs
    metrics = metric_names.in_short([name for name in report.columns if any(name in found for found in pairs.values())])
    table = Table(
        caption=f"{SEPARATED} separated from zero; a difference without it may be chance",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("difference", min_width=18)
    for metric in metrics:
        table.add_column(escape(metric), justify="right")
    for (better, worse), found in pairs.items():
        table.add_row(f"{escape(better)}\n− {escape(worse)}", *(_difference(found.get(metric)) for metric in metrics))
    others = Table.grid(padding=(0, 2))
    for it in report.others:
        named = f"{escape(it.metric)}: {escape(it.better)} − {escape(it.worse)}"
        others.add_row(named, _marked(it), f"[dim]{it.difference.signed_interval}[/]")
    return Group(*([table] if pairs else []), *([others] if report.others else []))


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
    return value + _below(estimate.short_interval)


def _difference(found: Comparison | None) -> str:
    return ABSENT if found is None else _marked(found) + _below(found.difference.short_signed_interval)


def _marked(found: Comparison) -> str:
    value = signed(found.difference.value)
    return f"[bold]{value}{SEPARATED}[/]" if found.separated else value


def _below(interval: str) -> str:
    return f"\n[dim]{interval}[/]" if interval else ""
