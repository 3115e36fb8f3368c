"""A report as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import math

import yaml

from rgalign_ray import __version__, storage
from rgalign_ray.evaluate.report import ABSENT, Report, number, signed
from rgalign_ray.progress import clock


def write(uri: str, report: Report) -> str:
    """Writes the report as one self-contained HTML file at `uri`, and returns `uri`.

    Every text is escaped; plots are inline SVG; the page asks the network for nothing.
    """
    storage.write_bytes(uri, render(report).encode())
    return uri


def render(report: Report) -> str:
    """The report as the text of one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from rgalign_ray.evaluate import plots  # matplotlib, which no run needs before its end

    environment = Environment(
        loader=PackageLoader("rgalign_ray", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=_percent, clock=clock, signed=signed)
    return environment.get_template("report.html.j2").render(
        report=report,
        version=__version__,
        absent=ABSENT,
        best={metric: report.best(metric) for metric in report.columns},
        config=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True) if report.config else "",
        plots=plots.all_of(report),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else ABSENT
