"""What the policy study found, as tables, CSV and a picture."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgalign_ray import storage
from rgalign_ray.evaluate import ab_test, plots, policy_value
from rgalign_ray.evaluate.policy_study import SHOP_POLICY, TARGETS, TRUE_CTR, Settings
from rgalign_ray.evaluate.statistics import Interval, t_interval

Rows = list[dict[str, Any]]

PICTURED = (
    "item-position SNIPS",
    "item-position DR",
    "prefix IPS",
    "prefix IPS, clipped",
    "prefix SNIPS",
    "cascade DR",
)
EFFECTIVE_SESSIONS = (0.0, 30.0, 100.0, 300.0, math.inf)
"""Classes by which coverage is shown."""
TRUSTED: dict[str, policy_value.Reward] = {
    "prefix IPS": "any click",
    "prefix SNIPS": "any click",
    "cascade DR": "any click",
    "item-position SNIPS": "clicks",
    "item-position DR": "clicks",
}
"""Estimators shown by effective sample size, with their reward."""
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d8f", "#e9a03b", "#6d597a")


@dataclass(frozen=True)
class Summary:
    estimators: Rows
    """By target, reward and estimator: bias, rmse and coverage over seeds, each with its 95 % interval."""
    effective: Rows
    """By estimator and effective sample size: coverage, over all targets and seeds."""
    rankers: Rows
    """By offline metric: rank correlation with true CTR, and what is lost by choosing by it."""
    a_b: Rows
    """By target: its true CTR against the old ranker's, and the sessions that an A/B test of it would need."""
    a_a: dict[str, float]


def summarise(found: dict[str, Any]) -> Summary:
    """Over the seeds of `policy_study.run`, of which there must be at least two."""
    seeds = found["seeds"]
    return Summary(_estimators(seeds), _effective(seeds), _rankers(seeds), _a_b(seeds), found["a_a"])


def _estimators(seeds: Rows) -> Rows:
    by_key: dict[tuple[str, str, str], Rows] = {}
    for row in (row for seed in seeds for row in seed["estimates"]):
        by_key.setdefault((row["target"], row["reward"], row["estimator"]), []).append(row)
    return [_over_seeds(*key, rows) for key, rows in by_key.items()]


def _over_seeds(target: str, reward: str, estimator: str, rows: Rows) -> dict[str, Any]:
    truth = np.array([row["truth"] for row in rows])
    error = np.array([row["value"] for row in rows]) - truth
    squared = t_interval(error**2)
    found: dict[str, Any] = {
        "target": target,
        "reward": reward,
        "estimator": estimator,
        "truth": float(truth.mean()),
        "bias": float(error.mean()),
        "bias_interval": t_interval(error),
        "rmse": math.sqrt((error**2).mean()),
        "rmse_interval": (math.sqrt(max(squared[0], 0.0)), math.sqrt(squared[1])),
        "standard_error": float(np.mean([row["standard_error"] for row in rows])),
        "effective_sessions": float(np.median([row["effective_sessions"] for row in rows])),
        "largest_weight": float(np.median([row["largest_weight"] for row in rows])),
        "seeds": len(rows),
    }
    for kind in ("normal", "bootstrap"):
        low, high = np.array([row[kind] for row in rows]).T
        covered = float(((low <= truth) & (truth <= high)).mean())
        found |= {f"{kind}_coverage": covered, f"{kind}_coverage_interval": ab_test.wilson(covered, len(rows))}
    return found


def _effective(seeds: Rows) -> Rows:
    found = []
    every = [row for seed in seeds for row in seed["estimates"]]
    for estimator, reward in TRUSTED.items():
        rows = [row for row in every if (row["estimator"], row["reward"]) == (estimator, reward)]
        size = np.array([row["effective_sessions"] for row in rows])
        truth = np.array([row["truth"] for row in rows])
        low, high = np.array([row["bootstrap"] for row in rows]).T
        for least, most in itertools.pairwise(EFFECTIVE_SESSIONS):
            inside = (least <= size) & (size < most)
            if count := int(inside.sum()):
                covered = float(((low <= truth) & (truth <= high))[inside].mean())
                found.append(
                    {
                        "estimator": estimator,
                        "reward": reward,
                        "from": least,
                        "to": most,
                        "coverage": covered,
                        "coverage_interval": ab_test.wilson(covered, count),
                        "estimates": count,
                    }
                )
    return found


def _rankers(seeds: Rows) -> Rows:
    """Spearman's correlation over the rankers of each seed, and the true CTR lost by taking the metric's first."""
    compared = [seed["rankers"] for seed in seeds if seed["rankers"]]
    if len(compared) < 2:
        return []
    found = []
    for metric in (name for name in compared[0][0] if name != TRUE_CTR):
        correlations, lost = [], []
        for rankers in compared:
            values = np.array([ranker[metric] for ranker in rankers])
            truth = np.array([ranker[TRUE_CTR] for ranker in rankers])
            if not np.isnan(values).any():  # no session of the uniform slice has a click
                correlations.append(float(np.corrcoef(_ranks(values), _ranks(truth))[0, 1]))
                lost.append(float(truth.max() - truth[values.argmax()]))
        if len(correlations) > 1:
            found.append(
                {
                    "metric": metric,
                    "correlation": float(np.mean(correlations)),
                    "correlation_interval": t_interval(np.array(correlations)),
                    "lost": float(np.mean(lost)),
                    "lost_interval": t_interval(np.array(lost)),
                    "seeds": len(correlations),
                }
            )
    return sorted(found, key=lambda row: -row["correlation"])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks of tied values."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _a_b(seeds: Rows) -> Rows:
    rates = {name: np.array([seed["values"][name]["any click"] for seed in seeds]) for name in TARGETS}
    control = rates.pop(SHOP_POLICY)
    found = []
    for name, treatment in rates.items():
        lift = float(treatment.mean() / control.mean() - 1)
        found.append(
            {
                "target": name,
                "control": float(control.mean()),
                "treatment": float(treatment.mean()),
                "difference": float((treatment - control).mean()),
                "difference_interval": t_interval(treatment - control),
                "needed": ab_test.needed_sessions(float(control.mean()), lift),
            }
        )
    return found


def write(found: Summary, settings: Settings, command: str, out: str) -> None:
    """study.md, study.csv, rankers.csv and study.png under `out`."""
    storage.write_bytes(storage.join(out, "study.md"), markdown(found, settings, command).encode())
    storage.write_bytes(storage.join(out, "study.csv"), table(found.estimators).encode())
    storage.write_bytes(storage.join(out, "rankers.csv"), table(found.rankers).encode())
    storage.write_bytes(storage.join(out, "study.png"), picture(found))


def table(rows: Rows) -> str:
    """As CSV; an interval is two columns."""
    sink = io.StringIO()
    flat = [_flat(row) for row in rows]
    if flat:
        writer = csv.DictWriter(sink, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return sink.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            stem = name.removesuffix("_interval")
            found |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
        else:
            found[name] = value
    return found


def markdown(found: Summary, settings: Settings, command: str) -> str:
    """The study as a page: every figure with its 95 % interval."""
    seeds = found.estimators[0]["seeds"]
    lines = [
        "# Off-policy estimates against the truth",
        "",
        f"`{command}`",
        "",
        f"{seeds} shops with clicks by the {settings.clicks} model; a log of about {settings.sessions:,} sessions, "
        f"a truth of {settings.sessions * settings.population:,}. In brackets: 95 % intervals, of bias and RMSE "
        "Student's t over shops, of coverage Wilson's.",
    ]
    for target in TARGETS:
        for reward in ("clicks", "any click"):
            rows = [row for row in found.estimators if (row["target"], row["reward"]) == (target, reward)]
            what = "expected clicks per slate" if reward == "clicks" else "P(at least one click)"
            lines += ["", f"## {target}: {what}, true value {rows[0]['truth']:.4f}", "", *_estimator_table(rows)]
    lines += ["", "## How many effective sessions an interval needs", "", *_effective_table(found.effective)]
    lines += ["", "## A/B tests, and the sessions they need", "", *_a_b_table(found.a_b)]
    lines += ["", "## A/A tests", "", *_a_a_table(found.a_a)]
    if found.rankers:
        lines += ["", "## What orders rankers as their true CTR does", "", *_ranker_table(found.rankers)]
    return "\n".join(lines) + "\n"


def _estimator_table(rows: Rows) -> list[str]:
    lines = [
        "| estimator | bias | RMSE | covered, normal | covered, bootstrap | effective sessions | largest weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['estimator']} | {row['bias']:+.4f} {_span(row['bias_interval'], '+.4f')} "
            f"| {row['rmse']:.4f} {_span(row['rmse_interval'], '.4f')} "
            f"| {row['normal_coverage']:.0%} {_span(row['normal_coverage_interval'], '.0%')} "
            f"| {row['bootstrap_coverage']:.0%} {_span(row['bootstrap_coverage_interval'], '.0%')} "
            f"| {row['effective_sessions']:,.0f} | {row['largest_weight']:,.1f} |"
        )
    return lines


def _effective_table(rows: Rows) -> list[str]:
    classes = list(itertools.pairwise(EFFECTIVE_SESSIONS))
    names = [f"{least:.0f} to {most:.0f}" if most < math.inf else f"{least:.0f} and more" for least, most in classes]
    lines = [
        "Truth inside the 95 % bootstrap interval, by effective sample size; the five targets of a shop share its log.",
        "",
        f"| estimator | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for estimator, reward in TRUSTED.items():
        cells = []
        for least, _ in classes:
            row = next((row for row in rows if (row["estimator"], row["from"]) == (estimator, least)), None)
            cells.append(
                f"{row['coverage']:.0%} {_span(row['coverage_interval'], '.0%')} of {row['estimates']}" if row else "–"
            )
        lines.append(f"| {estimator}, {reward} | {' | '.join(cells)} |")
    return lines


def _a_b_table(rows: Rows) -> list[str]:
    lines = [
        "Noise-free, over the same sessions and random numbers. Needed: sessions of each arm, at 5 % and power 80 %.",
        "",
        "| policy | true CTR | against the old ranker | relative | needed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['target']} | {row['treatment']:.4f} "
            f"| {row['difference']:+.4f} {_span(row['difference_interval'], '+.4f')} "
            f"| {row['treatment'] / row['control'] - 1:+.1%} | {row['needed']:,} |"
        )
    rates = [(0.3, 0.0098), (0.3, 0.0013)]
    needed = [f"{lift:+.2%} of {rate} needs {ab_test.needed_sessions(rate, lift):,}" for rate, lift in rates]
    return [*lines, "", f"For scale: {'; '.join(needed)}."]


def _a_a_table(found: dict[str, float]) -> list[str]:
    repetitions = int(found["repetitions"])
    lines = [
        f"{repetitions:,} A/A tests at 5 % over {found['sessions']:,.0f} sessions of {found['users']:,.0f} users.",
        "",
        "| drawn into arms | test over | false positives |",
        "|---|---|---|",
    ]
    names = {
        "by_session": "sessions | sessions",
        "users_by_session": "users | sessions, as if independent",
        "by_user": "users | users",
    }
    for name, said in names.items():
        interval = _span(ab_test.wilson(found[name], repetitions), ".1%")
        lines.append(f"| {said} | {found[name]:.1%} {interval} |")
    return lines


def _ranker_table(rows: Rows) -> list[str]:
    lines = ["| offline metric | rank correlation | true CTR lost by its choice | shops |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['metric']} | {row['correlation']:.3f} {_span(row['correlation_interval'], '.3f')} "
            f"| {row['lost']:.4f} {_span(row['lost_interval'], '.4f')} | {row['seeds']} |"
        )
    return lines


def _span(interval: Interval, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def picture(found: Summary) -> bytes:
    """PNG: coverage and RMSE of the estimators of clicks by target, and how metrics order rankers."""
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    rows = [row for row in found.estimators if row["reward"] == "clicks" and row["estimator"] in PICTURED]

    def by_estimator(axes: Axes, value: str, title: str, scale: Callable[[float], float]) -> None:
        for number, target in enumerate(TARGETS):
            for row in (row for row in rows if row["target"] == target):
                height = PICTURED.index(row["estimator"]) + 0.14 * (number - 2)
                low, high = (scale(bound) for bound in row[f"{value}_interval"])
                axes.hlines(height, low, high, color=COLOURS[number], linewidth=1.4)
                label = target if row["estimator"] == PICTURED[0] else None
                axes.plot(scale(row[value]), height, "o", color=COLOURS[number], markersize=4, label=label)
        _heights(axes, PICTURED)
        axes.set_title(title)

    style = plots.STYLE | {"grid.color": "#dddddd", "axes.edgecolor": "#dddddd", "ytick.color": "#333333"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13.5, 4.6), layout="constrained", dpi=120)
        first, second, third = figure.subplots(1, 3)
        by_estimator(first, "normal_coverage", "Truth inside the 95 % normal interval, %", _percent)
        first.axvline(95, color="#777777", linewidth=1, linestyle=":")
        first.legend(title="target policy", loc="upper left", frameon=True, edgecolor="#dddddd")
        by_estimator(second, "rmse", "RMSE of clicks per slate", float)
        second.set_xlim(left=0)
        second.set_yticklabels([])
        for height, row in enumerate(found.rankers):
            third.hlines(height, *row["correlation_interval"], color=COLOURS[0], linewidth=1.4)
            third.plot(row["correlation"], height, "o", color=COLOURS[0], markersize=4.5)
        _heights(third, [row["metric"] for row in found.rankers])
        third.set_title(f"Rank correlation with {TRUE_CTR} over rankers")
        sink = io.BytesIO()
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _heights(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _percent(share: float) -> float:
    return 100 * share
