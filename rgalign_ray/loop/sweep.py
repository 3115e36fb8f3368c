"""One setting over several values: a comparison for each, and what becomes of the gain as the setting changes.

for each value:  `compare` with that value, in a folder of its own      (its slices are resumed as ever)
at the end:      QE-Rec's gain over the best rival by value, as a page, Markdown and JSON
"""

from __future__ import annotations

import re
from functools import reduce

from rich.console import Console

from rgalign_ray import storage
from rgalign_ray.config import Config, with_setting
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate import report, report_page, report_text
from rgalign_ray.loop import compare, controller
from rgalign_ray.loop.ladder_rows import ROWS, rows_of

NEGLIGIBLE = 0.05
"""A gain counts as none where its upper end is below this share of the gain at the configured value."""


def run(config: Config, key: str, values: list[str], control: str | None = None) -> report.Report:
    """Compares at every value of the setting `key`, and shows what was gained at each.

    Args:
        values: as YAML, as `--set` takes them.
        control: one of the values, at which there should be no gain; None where no such value is known.

    Raises:
        ConfigError: for a setting that does not exist, a value that it cannot have, a value that stands twice, a
            control that is none of them, or rows without QE-Rec and a rival, before anything runs.
        Others: as `compare.run`.
    """
    if key in ("seed", "world.seed"):
        raise ConfigError(f"--over {key}: a comparison sets it by compare.first_seed and compare.seeds.")
    room, _, name = key.partition(".")
    tuned = [model for model, settings in config.compare.tuned.items() if room == "ranker" and name in settings]
    if tuned:
        raise ConfigError(
            f"--over {key}: compare.tuned has it for {', '.join(tuned)}, which would be the same at every value; "
            "leave that out with --set compare.tuned={}."
        )
    rows = rows_of(config)
    if "qe_rec" not in rows or not any(ROWS[row].rival for row in rows):
        raise ConfigError("compare.rows: a sweep shows what qe_rec gains over a rival; name it and at least one row.")
    configs = {value_of(changed, key): changed for changed in (with_setting(config, key, value) for value in values)}
    if len(configs) != len(values):
        raise ConfigError(f"--over {key}: a value stands twice in {', '.join(values)}.")
    chosen = None if control is None else value_of(with_setting(config, key, control), key)
    if chosen is not None and chosen not in configs:
        raise ConfigError(f"--control {control}: not one of {', '.join(values)}.")
    controller.settle(config)  # marks the folder as one of a run
    made = {}
    for value, changed in configs.items():
        controller.console.print(f"[bold]{key} = {value}[/bold]")
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{key.rpartition('.')[2]}_{value}")
        made[value] = compare.run(changed.model_copy(update={"run_dir": storage.join(config.run_uri, name)}))
    swept = sweep_report(config, key, made, chosen)
    place = storage.join(config.run_uri, "sweep")
    report_page.write(f"{place}.html", swept)
    storage.write_bytes(f"{place}.md", report_text.markdown(swept).encode())
    storage.write_json(f"{place}.json", swept.model_dump(mode="json"))
    out = Console(width=max(Console().width, controller.TABLE_WIDTH))
    out.print(report_text.headline(swept))
    out.print("\n".join(swept.summary))
    out.print(f"sweep: {place}.html, .md, .json")
    return swept


def value_of(config: Config, key: str) -> str:
    """The value of the setting `key` (a.b), as text: equal values are equal text, however they were written."""
    return str(reduce(getattr, key.split("."), config))


def sweep_report(config: Config, key: str, made: dict[str, report.Report], control: str | None = None) -> report.Report:
    """The first claim of each comparison by value: QE-Rec against that value's best rival."""
    gains = {value: _first_claim(one) for value, one in made.items()}
    first = next(iter(made.values()))
    return report.Report(
        title=f"{config.name}: gains by {key}",
        lead=f"What QE-Rec gains over the best row without an LLM, at {len(made)} values of {key}.",
        summary=_equivalence(gains, value_of(config, key), control) if control is not None else [],
        facts={name: first.facts[name] for name in ("log", "seeds", "intervals", "reasoner") if name in first.facts},
        metrics=first.metrics,
        rows=[
            report.Row(
                name=f"{key.rpartition('.')[2]} {value}",
                metrics={it.metric: it.difference for it in claim},
                note=f"{claim[0].better} − {claim[0].worse}" if claim else "",
                control=value == control,
            )
            for value, claim in gains.items()
        ],
        config=config.model_dump(mode="json"),
    )


def _first_claim(one: report.Report) -> list[report.Comparison]:
    """A comparison a metric."""
    pairs = [(it.better, it.worse) for it in one.comparisons]
    return [it for it, pair in zip(one.comparisons, pairs, strict=True) if pair == pairs[0]]


def _equivalence(gains: dict[str, list[report.Comparison]], default: str, control: str) -> list[str]:
    """Whether the control's gains are negligible beside those at the configured value, a sentence a metric."""
    if default not in gains:
        return [f"No gain at the configured value {default}, which is not among {', '.join(gains)}."]
    there = {it.metric: it.difference for it in gains[default]}
    lines = []
    for it in gains[control]:
        gain, high = there[it.metric].value, it.difference.high
        if gain <= 0 or high is None:
            lines.append(f"{it.metric}: nothing is gained at {default}, so nothing can be said of {control}.")
            continue
        verdict = "no gain" if high < NEGLIGIBLE * gain else "not shown to be none"
        lines.append(
            f"{it.metric}: at {control} the gain is at most {high:+.4f}, {high / gain:.0%} of that at {default} "
            f"({gain:+.4f}): {verdict} (below {NEGLIGIBLE:.0%})."
        )
    return lines
