"""A finished run as a report: what its manifests and its evaluation say, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rgalign_ray import progress, storage
from rgalign_ray.config import Config
from rgalign_ray.evaluate import diagnosis, metric_names, query_worth
from rgalign_ray.evaluate.report import Comparison, Curves, Diagnosis, Example, Ingest, Report, RewardGate, Row
from rgalign_ray.evaluate.report import Stage as StageTime
from rgalign_ray.loop import audit_stages, rank_stages, worth_stages
from rgalign_ray.loop.stage import Run
from rgalign_ray.loop.stages import stages

LEAD = (
    "The ranker teaches the reasoner which latent queries are useful; the aligned reasoner gives the ranker a better "
    "feature."
)


def report(run: Run) -> Report:
    """The report of a run all of whose stages are done."""
    config = run.config
    evaluation = storage.read_json(run.uri("evaluation", "evaluation.json"))
    sequence = stages(config)
    manifests = {stage.name: run.manifest(stage.name) for stage in sequence}
    sessions = manifests["sessions"].figures
    comparisons = [Comparison.model_validate(c) for c in evaluation["comparisons"]]
    gates = [manifests[f"rewards_{r}"].figures["gate"] for r in range(1, config.rounds + 1)]
    metrics = metric_names.meanings(config.evaluate)
    diagnoses = [Diagnosis.model_validate(found) for found in evaluation["diagnoses"]]
    truth = worth_stages.query_worth_of([run], config.rounds)
    return Report(
        title=f"{config.name}: RGAlign-Rec on {config.log.source}",
        lead=LEAD,
        summary=[
            *_summary(run, manifests, comparisons, gates),
            *([query_worth.sentence(truth)] if truth else []),
            *(diagnosis.sentence(found) for found in diagnoses),
        ],
        facts={
            "log": config.log.source,
            "sessions": f"{sessions['kept']:,}, {sessions['first_day']} to {sessions['last_day']}",
            "reasoner": config.reasoner.model,
            "alignment": " + ".join(config.align),
            "rounds": str(config.rounds),
            "queries a session": _sources(config),
            "seed": str(config.seed),
            "intervals": f"{config.evaluate.confidence:.0%}, bootstrap over users, one seed",
        },
        config=config.model_dump(mode="json"),
        metrics=metrics,
        rows=[_ordered(Row.model_validate(row), list(metrics)) for row in evaluation["rows"]],
        comparisons=comparisons,
        query_variance=evaluation["query_variance"],
        examples=[Example.model_validate(example) for example in evaluation["examples"]],
        reward=reward_gate([gates[-1]], [manifests[f"rollouts_{config.rounds}"].figures["valid_rate"]]),
        worth=truth,
        diagnoses=diagnoses,
        curves=_curves(manifests),
        stages=[StageTime(name=name, seconds=m.seconds, peak_mb=m.peak_memory_mb) for name, m in manifests.items()],
        ingest=Ingest(sessions=sessions["kept"], roles=sessions["roles"], quarantined=sessions["quarantined"]),
    )


def reward_gate(gates: Sequence[Mapping[str, Any]], valid_rates: Sequence[float]) -> RewardGate:
    """The gate's figures, averaged over one or more seeds."""

    def mean(name: str) -> Any:
        return np.mean([gate[name] for gate in gates], axis=0).tolist()

    return RewardGate(
        **{name: mean(name) for name in ("spread", "noise", "reliability", "best_of_n", "best_of_n_judged")},
        best_of_n_audited=mean("best_of_n_audited") if gates[0]["best_of_n_audited"] else [],
        spread_by_session=[it for gate in gates for it in gate["spread_by_session"]],
        noise_by_session=[it for gate in gates for it in gate["noise_by_session"]],
        valid_rate=float(np.mean(valid_rates)),
    )


def unjudged(rollouts: Sequence[storage.Manifest]) -> list[str]:
    """How many queries were never judged, by reason: a sentence, or none where all were."""
    faults = sum((Counter(manifest.figures["faults"]) for manifest in rollouts), Counter[str]())
    if not faults:
        return []
    sampled = sum(manifest.rows["rollouts"] for manifest in rollouts)
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in faults.most_common())
    return [f"Not judged of {sampled:,} sampled queries: {reasons}."]


def _sources(config: Config) -> str:
    """Who wrote how many queries a session."""
    if not config.teachers:
        return str(config.rollout.n)
    shares = [f"{config.rollout.n} policy", *(f"{teacher.n} {teacher.name}" for teacher in config.teachers)]
    alike = all(teacher.model in (None, config.reasoner.model) for teacher in config.teachers)
    return " + ".join(shares) + (", all of one LLM" if alike else "")


def _ordered(row: Row, metrics: list[str]) -> Row:
    """The row with its metrics in their order of importance, which JSON does not keep."""
    return row.model_copy(update={"metrics": {name: row.metrics[name] for name in metrics if name in row.metrics}})


def _summary(
    run: Run, manifests: dict[str, storage.Manifest], comparisons: list[Comparison], gates: list[dict[str, Any]]
) -> list[str]:
    """What was found, a sentence each; differences that may be chance are called so."""
    lines = []
    there = {comparison.metric for comparison in comparisons}
    first = next(name for name in metric_names.meanings(run.config.evaluate) if name in there)
    named = (first, f"true CTR@{run.config.evaluate.k}")  # the second where the truth is known
    spoken = [it for it in comparisons if it.metric in named]
    for pair in dict.fromkeys((it.better, it.worse) for it in spoken):
        found = [it for it in spoken if (it.better, it.worse) == pair]
        lines.append(sentence(found, "separated over users (one seed)"))
    for round_, gate in enumerate(gates, 1):
        which = f"Reward gate, round {round_}" if len(gates) > 1 else "Reward gate"
        lines.append(
            f"{which}, {gate['sessions']} sessions: within-session spread {gate['spread']:.4f} against judge noise "
            f"{gate['noise']:.4f}; reliability {gate['reliability']:.2f}; in one judge's best of "
            f"{len(gate['best_of_n'])} another sees {gate['agreement']:+.4f} ± {gate['agreement_error']:.4f} "
            "(standard error) over the session's mean."
            + (f" The auditor agrees with a correlation of {gate['audit']:.2f}." if gate["audit"] is not None else "")
        )
    if run.config.roles.audit:
        lines.append(audit_stages.hearing_sentence([manifests[audit_stages.AUDITOR]]))
    for round_ in range(1, len(gates) + 1):
        if audit_stages.audited_stages(run.config, round_):
            seen = audit_stages.gain(run, round_)
            lines.append(
                f"Validation queries of round {round_} over those of round {round_ - 1}, as the auditor rewards them: "
                f"{seen.mean:+.4f} ({seen.users[0]:+.4f} to {seen.users[1]:+.4f} over users)."
            )
    for round_ in range(1, len(gates) + 1):
        if rank_stages.is_warm(run.config, round_):
            figures = manifests[f"rankers_{round_}"].figures["qe_rec"]
            lines.append(rank_stages.warm_sentence(round_, figures, run.config.retrain.margin))
    first, *later = (manifests[f"embeddings_{r}"].figures["valid_rate"] for r in range(len(gates) + 1))
    lines.append(
        f"Valid latent queries: {first:.1%} before alignment, {', '.join(f'{rate:.1%}' for rate in later)} after."
    )
    lines += unjudged([manifests[f"rollouts_{round_}"] for round_ in range(1, len(gates) + 1)])
    for round_ in range(1, len(gates) + 1) if run.config.teachers else ():
        chosen = manifests[f"selected_{round_}"].figures["chosen_by_source"]
        valid = manifests[f"rollouts_{round_}"].figures["valid_rate_by_source"]
        told = ", ".join(f"{source} {chosen.get(source, 0)} ({rate:.0%} valid)" for source, rate in valid.items())
        lines.append(f"Chosen queries of round {round_} by who wrote them: {told}.")
    total, peak = sum(m.seconds for m in manifests.values()), max(m.peak_memory_mb for m in manifests.values())
    lines.append(f"Wall time of all stages: {progress.clock(total)}; peak memory {peak / 1024:.1f} GiB.")
    return lines


def sentence(found: Sequence[Comparison], separated: str) -> str:
    """How two rows differ in some metrics, with intervals, and where that may be chance; `separated` says over what it
    is none.
    """
    told = ", ".join(
        f"{it.metric} {it.difference.value:+.4f} ({it.difference.low:+.4f} to {it.difference.high:+.4f})"
        for it in found
    )
    sure = [it.metric for it in found if it.separated]
    alone = f" in {' and '.join(sure)} alone" if len(sure) < len(found) else ""
    return f"{found[0].better} over {found[0].worse}: {told}; {separated + alone if sure else 'not separated'}."


def _curves(manifests: dict[str, storage.Manifest]) -> list[Curves]:
    gauc = {
        f"{ranker}, round {name.removeprefix('rankers_')}": figures["gaucs"]
        for name, manifest in manifests.items()
        if name.startswith("rankers_")
        for ranker, figures in manifest.figures.items()
    }
    curves = [Curves(title="Rankers: validation GAUC", x="epoch", y="GAUC", lines=gauc)]
    for name, manifest in manifests.items():
        if name.startswith("align_"):
            lines = {key: values for key, values in manifest.figures.items() if isinstance(values, list)}
            curves.append(Curves(title=name, x="step", y="nats; accuracies and rates as shares", lines=lines))
    return curves
