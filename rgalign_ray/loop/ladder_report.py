"""The ladder's table and its claims, from what every slice left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rgalign_ray import storage
from rgalign_ray.config import Config, RankBy, RowName
from rgalign_ray.evaluate import comparison, metric_names, report
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.evaluate.statistics import Estimate
from rgalign_ray.loop import summary
from rgalign_ray.loop.ladder_rows import ROWS

METHOD: tuple[RowName, ...] = ("qe_rec", "rgalign", "rgalign_warm")
CEILING: RowName = "true_need"
TEXT_RIVALS: tuple[RowName, ...] = ("din_sentence", "template")
"""They read the same text as the reasoner: whatever validation says, a reasoner must beat them."""
ALONE: tuple[RowName, ...] = ("rg_sft", "rg_dpo", "rg_grpo", "rg_cl", "latent", "gradient", "rga_paper")
"""Rows whose reasoner one objective has aligned, or the published two."""
SFT_CONTROLS: tuple[RowName, ...] = ("rg_sft_random", "sft_title")
WAYS = ("_query", "_warm", "_not_retrained", "_not_retrained_query")
"""Endings of rows that are held against each other as those without one are."""
BY_REGION = ("GAUC", "true CTR")
"""Metrics that are shown by region, where the log has them."""


@dataclass(frozen=True)
class RowResult:
    """One row under every seed that has it."""

    row: RowName
    seeds: list[int]
    verdicts: list[Verdict]
    manifests: list[storage.Manifest]
    """Of its slices, as many a seed as it has rankers."""
    before_s: float
    """Seconds of what its slices take up, a seed: texts that were read, and a ranker that another row has trained."""
    exploratory: bool = False
    """Not of all seeds."""

    @property
    def title(self) -> str:
        return ROWS[self.row].title + (" (exploratory)" if self.exploratory else "")

    @property
    def seconds(self) -> float:
        return self.before_s + float(np.mean([manifest.seconds for manifest in self.manifests]))

    def calibration(self) -> report.Calibration:
        seeds = [manifest.figures["calibration"] for manifest in self.manifests]
        count, expected, observed = (
            np.sum([seed[name] for seed in seeds], axis=0) for name in ("count", "expected", "observed")
        )
        filled = count > 0
        return report.Calibration(
            name=self.title,
            expected=(expected[filled] / count[filled]).tolist(),
            observed=(observed[filled] / count[filled]).tolist(),
        )


def make(config: Config, judged: list[RowResult]) -> report.Report:
    """The report of a comparison all of whose slices are done."""
    settings = config.evaluate
    by_row = {it.row: it for it in judged}
    first, *others = verdicts = max((it.verdicts for it in judged), key=len)
    found = [metric for metric in first.values if all(metric in verdict.values for verdict in others)]
    meanings = metric_names.meanings(settings)
    metrics = [metric for metric in meanings if metric in found]
    rows = [
        report.Row(
            name=it.title,
            metrics={metric: _over_users(comparison.estimate(it.verdicts, metric, settings)) for metric in metrics},
            note=ROWS[it.row].note,
            control=ROWS[it.row].control,
            seconds=it.seconds,
        )
        for it in judged
    ]
    pairs = [
        (better, worse)
        for better, worse in claims([it.row for it in judged], validation(judged, settings.rank_by))
        if _seeds(by_row[better], by_row[worse])
    ]
    comparisons = [
        _compare(by_row[better], by_row[worse], metric, config) for better, worse in pairs for metric in metrics
    ]
    seeds = len(verdicts)
    claimed = "the wider of those over users and over seeds" if seeds > 1 else "over users; one seed"
    explored = sorted({seed for it in judged if it.exploratory for seed in it.seeds})
    once = {"exploratory rows": f"of seed {' or '.join(map(str, explored))} alone"} if explored else {}
    return report.Report(
        title=f"{config.name}: rankers on {config.log.source}, {seeds} seed{'s' if seeds > 1 else ''}",
        lead="Rankers side by side on the same test sessions, equally trained.",
        summary=_summary(config, by_row, comparisons, pairs, metrics),
        facts={
            "log": config.log.source,
            "seeds": str(seeds),
            **once,
            "rankers a row and seed": f"{config.compare.trainings}; figures are their mean",
            "test sessions a seed": f"{len(first.sessions):,}",
            "candidates a session": f"{np.mean(first.weights['GAUC']):,.1f}",
            "sessions that count in GAUC": f"{np.mean(~np.isnan(first.values['GAUC'])):.1%}",
            "reasoner": config.reasoner.model,
            "encoder": config.compare.encoder.model,
            "settings": "tuned by validation in another world" if config.compare.tuned else "the same for every row",
            "intervals": f"{settings.confidence:.0%}; of rows over users, of differences {claimed}",
        },
        metrics={name: text for name, text in meanings.items() if name in metrics},
        rows=[*(row for row in rows if not row.control), *(row for row in rows if row.control)],
        comparisons=comparisons,
        breakdowns=_by_region(config, [by_row[row] for row in _featured(pairs)], metrics),
        calibration=[by_row[row].calibration() for row in _featured(pairs)],
        stages=[
            report.Stage(
                name=f"{it.title}, all seeds",
                seconds=sum(m.seconds for m in it.manifests),
                peak_mb=max(m.peak_memory_mb for m in it.manifests),
            )
            for it in judged
        ],
        config=config.model_dump(mode="json"),
    )


def validation(judged: list[RowResult], rank_by: RankBy) -> dict[RowName, float]:
    """GAUC of each rival on validation sessions, as it ranks: by clicks among what was shown, if all were judged so,
    else among all candidates.
    """
    of = {it.row: [manifest.figures for manifest in it.manifests] for it in judged if ROWS[it.row].rival}
    shown = rank_by == "click" and all("gauc_shown" in figures for row in of.values() for figures in row)
    name = "gauc_shown" if shown else "best_gauc"
    return {row: float(np.mean([each[name] for each in figures])) for row, figures in of.items()}


def claims(names: list[RowName], judged: dict[RowName, float]) -> list[tuple[RowName, RowName]]:
    """Pairs to compare, the one expected to be better first.

    The best rival is the row without an LLM that is `judged` best on validation sessions: chosen by the test sessions,
    it would be the luckiest. What learns from role rank alone is held against what does, too; the method as a whole
    against all.

    Args:
        names: of all rows.
        judged: of rivals, what `validation` says.
    """
    rivals = sorted((name for name in names if ROWS[name].rival), key=lambda name: judged[name])
    best = [name for name in rivals if not ROWS[name].more][-1:]
    pairs: list[tuple[RowName, RowName]] = [
        *(("qe_rec", rival) for rival in best),
        ("qe_rec", "two_tower"),
        *(("qe_rec", rival) for rival in TEXT_RIVALS),
        *((rival, "popularity") for rival in best),
        ("qe_rec", "qe_rec_shuffled"),
        ("rgalign", "qe_rec"),
        *((row, "qe_rec_more") for row in ("rgalign", "rgalign_warm", "gradient")),
        *((row, rival) for row in METHOD[1:] for rival in [*rivals[-1:], *best, *TEXT_RIVALS]),
        ("rgalign", "rgalign_shuffled"),
        ("rgalign", "gradient"),
        *(("rg_sft", control) for control in SFT_CONTROLS),
        *((row, "qe_rec") for row in ALONE),
        ("rgalign", "rga_paper"),
        ("gradient", "gradient_shuffled"),
        *(pair for name in names for pair in _variant_claims(name)),
        *((f"rg_sft{way}", f"{control}{way}") for way in WAYS for control in SFT_CONTROLS),
        *((f"rgalign{way}", f"gradient{way}") for way in WAYS),
        *((f"{row}_query", "qe_rec_query") for row in ("rgalign", "rg_sft")),
        ("qe_rec_warm", "judge"),
        *(("gradient_warm", rival) for rival in TEXT_RIVALS),
        ("rgalign", "judge"),
        *((CEILING, rival) for rival in best),
    ]
    there = [(better, worse) for better, worse in pairs if better in names and worse in names and better != worse]
    return list(dict.fromkeys(there))


def _variant_claims(name: RowName) -> list[tuple[RowName, RowName]]:
    """What a row that differs from another in one thing is held against: that one, and its like on a frozen LLM."""
    row = ROWS[name]
    if row.variant_of is None:
        return []
    if row.readout in ("other", "shift"):
        return [(row.variant_of, name)]
    if row.readout == "centred":
        return [(name, "judge"), (name, row.variant_of)]
    ending = "_query" if row.readout == "query" else ""
    pairs = [(name, row.variant_of)] if row.retrained or ending else [(row.variant_of, name)]
    if row.warm:
        return [(name, f"qe_rec_warm{ending}"), *pairs, (name, "qe_rec")]
    return pairs if row.retrained else [(name, f"judge{ending}"), *pairs]


def _compare(better: RowResult, worse: RowResult, metric: str, config: Config) -> report.Comparison:
    ours, theirs = _together(better, worse)
    found = comparison.difference(ours, theirs, metric, config.evaluate)
    return report.Comparison(
        better=better.title,
        worse=worse.title,
        metric=metric,
        difference=_claimed(found),
        separated=found.separated,
    )


def _seeds(*rows: RowResult) -> list[int]:
    """Those that all have."""
    first, *others = rows
    return [seed for seed in first.seeds if all(seed in row.seeds for row in others)]


def _together(*rows: RowResult) -> list[list[Verdict]]:
    """Each row's, of the seeds that all have."""
    return [[row.verdicts[row.seeds.index(seed)] for seed in _seeds(*rows)] for row in rows]


def _summary(
    config: Config,
    by_row: dict[RowName, RowResult],
    comparisons: list[report.Comparison],
    pairs: list[tuple[RowName, RowName]],
    metrics: list[str],
) -> list[str]:
    """What was found, a sentence each: how competitors differ in the metrics that tell, and what QE-Rec and RGAlign-Rec
    are worth beside the best rival. Rows that show why stand in the table and the plots.
    """
    told = metric_names.telling(metrics)
    lines = []
    for better, worse in [pair for pair in pairs if _spoken(*pair, by_row)]:
        one, other = by_row[better], by_row[worse]
        found = [it for it in comparisons if (it.better, it.worse) == (one.title, other.title) and it.metric in told]
        over = "over users and seeds" if len(_seeds(one, other)) > 1 else "over users (one seed)"
        lines.append(summary.sentence(found, f"separated {over}"))
    first = {better: worse for better, worse in reversed(pairs) if ROWS[worse].rival}
    for row in [row for row in METHOD if row in first]:
        ours, rival = by_row[row], by_row[first[row]]
        mine, theirs = _together(ours, rival)
        reduced = comparison.share_of_gap(mine, theirs, 1.0, metrics[0], config.evaluate)
        line = f"{ours.title} against {rival.title}: {_share(reduced)} of the error 1 − {metrics[0]} is gone"
        if CEILING in by_row:
            mine, theirs, most = _together(ours, rival, by_row[CEILING])
            closed = [
                f"{_share(comparison.share_of_gap(mine, theirs, most, metric, config.evaluate))} in {metric}"
                for metric in told
            ]
            line += f"; of the headroom to the true need it closes {', '.join(closed)}"
        lines.append(f"{line}.")
    return lines


def _spoken(better: RowName, worse: RowName, by_row: Mapping[RowName, RowResult]) -> bool:
    """Whether a pair says what the method and its objectives are worth, and not why. Of what starts warm that is the
    method as a whole, which then stands against rivals for what is trained from scratch.
    """
    trained = all(ROWS[name].ranker_of is None and ROWS[name].retrained for name in (better, worse))
    own = ROWS[better].reads == "reasoner" and (better in METHOD or not ROWS[better].warm)
    again = better == "rgalign" and "rgalign_warm" in by_row and ROWS[worse].rival
    return trained and own and not again


def _share(found: Estimate) -> str:
    return f"{found.mean:+.1%} ({found.users[0]:+.1%} to {found.users[1]:+.1%} over users)"


def _featured(pairs: list[tuple[RowName, RowName]]) -> list[RowName]:
    """The rows whose details are shown: those that the first claims are about."""
    return list(dict.fromkeys(row for pair in pairs[:2] for row in pair))


def _by_region(config: Config, shown: list[RowResult], metrics: list[str]) -> list[report.Breakdown]:
    regions = sorted({region for it in shown for verdict in it.verdicts for region in verdict.regions})
    if len(regions) < 2:
        return []
    return [
        report.Breakdown(
            metric=metric,
            by="region",
            groups=regions,
            rows={
                it.title: [
                    _over_users(found) if found else None
                    for found in (
                        comparison.estimate_in(it.verdicts, metric, region, config.evaluate) for region in regions
                    )
                ]
                for it in shown
            },
        )
        for metric in metrics
        if metric.partition("@")[0] in BY_REGION
    ]


def _over_users(found: Estimate) -> report.Estimate:
    """A row's figure. Over seeds it varies with how hard each world is, which says nothing of the row."""
    return report.Estimate(value=found.mean, low=found.users[0], high=found.users[1])


def _claimed(found: Estimate) -> report.Estimate:
    """A difference with the wider of both intervals: it excludes zero where both do."""
    low, high = found.users
    if found.over_seeds is not None:
        low, high = min(low, found.over_seeds[0]), max(high, found.over_seeds[1])
    return report.Estimate(value=found.mean, low=low, high=high)
