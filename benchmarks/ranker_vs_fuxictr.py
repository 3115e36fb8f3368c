"""Our DIN beside FuxiCTR's: GAUC, training throughput, time of the metric, memory; each also as a ratio.

    python -m benchmarks.ranker_vs_fuxictr --out runs/peer

The same sessions, splits, encoded features and (session, candidate) pairs; the same embedding size, hidden layers,
dropout, optimiser, rate, samples a batch and early stopping on validation GAUC; one thread each. Contenders run in
turn, one at a time and in their own processes, so that a busy machine slows all of them. FuxiCTR gets an environment
of its own, made when it is missing. The same command goes on where it stopped; `--again` measures anew.

    fuxictr      the DIN and data loader of FuxiCTR's wheel: binary cross entropy over pairs
    rgalign      ours as shipped: ListNet over a session's candidates, scores start from the base rate
    pointwise    ours with FuxiCTR's objective: binary cross entropy over pairs, scores start from zero
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command, peer
from benchmarks.din_rgalign import rows_of
from rgalign_ray import config, progress, storage
from rgalign_ray.errors import UserError
from rgalign_ray.evaluate.statistics import t_interval
from rgalign_ray.logs import lists
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.features import FeatureSpace, FeatureSpec
from rgalign_ray.loop import log_stages
from rgalign_ray.loop.stage import Run
from rgalign_ray.metrics import gauc
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.reasoner.models import cache_dir

CONTENDERS = ("fuxictr", "rgalign", "pointwise")
ROOT = Path(__file__).parents[1]
DROPOUT = 0.3
"""As the packaged configurations of logs of this size have it."""

DATA = ("movielens", "shop")


def _settings(name: str, scale: float, epochs: int) -> config.Config:
    """The packaged configuration of a data set, with more of it in role rank; the rest of a scaled one lies unread."""
    if name == "movielens":
        rank, valid = round(0.84 * scale, 4), round(0.15 * scale, 4)
        audit = round(0.99 - rank - valid, 4)
        own = [
            f"roles={{split: time, test_days: 28, rank: {rank}, align: 0.01, valid: {valid}, audit: {audit}, test: 0}}"
        ]
    else:
        own = [
            f"world={{sessions: {round(10_000 * scale)}, users: {round(6_000 * scale)}, days: 14}}",
            "roles={test_days: 4, rank: 0.15, align: 0.01, valid: 0.05, audit: 0.0, test: 0.79}",
            "ranker={batch_sessions: 32}",
        ]
    both = [f"ranker.dropout={DROPOUT}", f"ranker.epochs={epochs}", "ranker.average=null"]
    return config.load({"movielens": "movielens", "shop": "demo"}[name], [*own, *both])


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the data, the runs and the results.")],
    data: Annotated[list[str] | None, typer.Option(help="movielens or shop; repeatable; both by default.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each contender.")] = 3,
    epochs: Annotated[int, typer.Option(min=2, help="Most epochs of a run; the first is not timed.")] = 20,
    scale: Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of the data that is used.")] = 1.0,
    again: Annotated[bool, typer.Option(help="Measure anew what is there already.")] = False,
    peer_env: Annotated[Path | None, typer.Option(help="Virtual environment of FuxiCTR.")] = None,
    torch_index: Annotated[str | None, typer.Option(help="Package index of that environment's torch.")] = None,
) -> None:
    """Train DIN in both libraries on the same data, and print what each reached and took."""
    folder = peer_env or cache_dir() / peer.FUXICTR.replace("==", "-")
    python = peer.environment(folder, torch.__version__.partition("+")[0], torch_index)
    results = {}
    for name in data or DATA:
        if name not in DATA:
            raise UserError(f"--data {name}: not one of {', '.join(DATA)}.")
        place = _prepare(name, out.absolute(), _settings(name, scale, epochs))
        if again:
            shutil.rmtree(place / "runs", ignore_errors=True)
        results[name] = _measure(name, place, seeds, python)
        _show(name, results[name])
    target = out / f"ranker_vs_fuxictr-{'-'.join(results)}.json"
    target.write_text(json.dumps(results, indent=2))
    print(target)


def _prepare(name: str, out: Path, settings: config.Config) -> Path:
    """The folder of a data set: its log, feature space, FuxiCTR's tables, and the settings of all contenders."""
    place = out / f"{name}-{storage.content_key(settings.model_dump(mode='json'))}"
    if (place / "settings.json").exists():
        return place
    progress.note(f"{name}: preparing the log")
    run = Run(settings.model_copy(update={"run_dir": str(place)}))
    (log_stages.make_shop if settings.log.source == "shop" else log_stages.make_movielens)(run, run.uri("log"))
    log = run.uri("sessions")
    log_stages.ingest_sessions(run, log)
    spec = FeatureSpec.load(settings.features.spec)
    learns = storage.read_table(storage.join(log, "sessions"), spec.columns, pc.field("role") == "rank")
    space = FeatureSpace.fit(spec, [learns], settings.log.history_length)
    storage.write_json(run.uri("features.json"), space.to_dict())
    catalogue = Catalogue.load(log)
    sizes = Sizes.of(space, num_intents=catalogue.size, embedding_dim=0, item_dim=0)
    roles = {"train": "rank", "valid": "valid", "test": "test"}
    parts = {part: rows_of(log, space, sizes, [role]) for part, role in roles.items()}
    tables = place / "fuxictr"
    tables.mkdir()
    peer.write(tables, parts, space, catalogue)
    labels = parts["test"]["clicks"]
    np.savez(place / "test.npz", groups=lists.rows(labels.counts), labels=labels.values.astype(np.float64))
    ranker = settings.ranker
    pairs = parts["train"]["candidates"].counts.mean()
    storage.write_json(
        str(place / "settings.json"),
        {
            "log": log,
            "space": run.uri("features.json"),
            "ranker": ranker.model_dump(mode="json"),
            "dim": ranker.dim,
            "hidden": [2 * ranker.dim, ranker.dim],
            "dropout": ranker.dropout,
            "lr": ranker.lr,
            "weight_decay": ranker.weight_decay,
            "epochs": ranker.epochs,
            "patience": ranker.patience,
            "batch_samples": round(ranker.batch_sessions * pairs),
            "history_length": space.history_length,
            "sessions": {part: len(rows["candidates"]) for part, rows in parts.items()},
            "pairs": {part: len(rows["candidates"].values) for part, rows in parts.items()},
        },
    )
    shutil.copy(place / "settings.json", tables)
    return place


def _measure(name: str, place: Path, seeds: int, python: Path) -> dict[str, Any]:
    runs = place / "runs"
    runs.mkdir(exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
    with progress.track(name, seeds * len(CONTENDERS), "runs") as advance:
        for seed in range(seeds):
            for contender in CONTENDERS:
                result = runs / f"{contender}-{seed}.json"
                if not result.exists():
                    command.apart(_command(contender, python, place, seed, result), threads=1, cwd=ROOT)
                found[contender].append(json.loads(result.read_text()) | {"test_gauc": _test_gauc(place, result)})
                advance(1)
    settings = json.loads((place / "settings.json").read_text())
    summary = {contender: _summary(rows) for contender, rows in found.items()}
    return {
        "sessions": settings["sessions"],
        "pairs": settings["pairs"],
        "batch_samples": settings["batch_samples"],
        "contenders": summary,
        "ratios": {ours: _ratios(summary[ours], summary["fuxictr"]) for ours in CONTENDERS[1:]},
        "gauc_difference": {ours: _difference(found[ours], found["fuxictr"]) for ours in CONTENDERS[1:]},
        "metric": _metric(place, python),
        "runs": found,
    }


def _command(contender: str, python: Path, place: Path, seed: int, result: Path) -> list[str]:
    if contender == "fuxictr":
        script = str(Path(__file__).with_name("din_fuxictr.py"))
        return [str(python), script, "train", str(place / "fuxictr"), str(seed), str(result)]
    command = [sys.executable, "-m", "benchmarks.din_rgalign", "train", str(place), str(seed), str(result)]
    return [*command, "pointwise"] if contender == "pointwise" else command


def _test_gauc(place: Path, result: Path) -> float:
    """GAUC of a run's scores of the test pairs, by one definition for all."""
    test = np.load(place / "test.npz")
    return gauc(np.load(result.with_suffix(".npy")), test["labels"], test["groups"])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of one contender come to; rates are medians of the runs' medians, with the slowest and fastest."""
    gaucs = [run["test_gauc"] for run in runs]
    epochs = [np.median(np.array(run["epochs"][1:]), axis=0) for run in runs]
    summary: dict[str, Any] = {
        "test_gauc": statistics.mean(gaucs),
        "test_gauc_interval": t_interval(np.array(gaucs)),
        "epochs": [len(run["epochs"]) for run in runs],
        "parameters": runs[0]["parameters"],
        "samples_per_s": _spread([run["samples"] / epoch[0] for run, epoch in zip(runs, epochs, strict=True)]),
        "samples_per_cpu_s": _spread([run["samples"] / epoch[1] for run, epoch in zip(runs, epochs, strict=True)]),
        "evaluation_s": _spread([statistics.median(run["evaluation_seconds"]) for run in runs]),
        "peak_mb": _spread([run["peak_mb"] for run in runs]),
    }
    if "step_seconds" in runs[0]:
        summary["step_samples_per_cpu_s"] = _spread([run["samples"] / run["step_seconds"][1] for run in runs])
    return summary


def _spread(values: list[float]) -> list[float]:
    """Median, least and greatest."""
    return [statistics.median(values), min(values), max(values)]


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Above 1 is in our favour."""
    return {
        "throughput": ours["samples_per_s"][0] / theirs["samples_per_s"][0],
        "throughput_cpu": ours["samples_per_cpu_s"][0] / theirs["samples_per_cpu_s"][0],
        "throughput_cpu_without_their_loader": ours["samples_per_cpu_s"][0] / theirs["step_samples_per_cpu_s"][0],
        "evaluation": theirs["evaluation_s"][0] / ours["evaluation_s"][0],
        "memory": theirs["peak_mb"][0] / ours["peak_mb"][0],
    }


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """Mean difference of test GAUC, ours − theirs, and its t-interval over seeds."""
    values = np.array([a["test_gauc"] - b["test_gauc"] for a, b in zip(ours, theirs, strict=True)])
    return [float(values.mean()), *t_interval(values)]


def _metric(place: Path, python: Path) -> dict[str, Any]:
    """Both metrics on the same scores of the same rows."""
    test = np.load(place / "test.npz")
    rows = place / "metric.npz"
    scores = np.load(place / "runs" / "rgalign-0.npy").astype(np.float64)
    np.savez(rows, labels=test["labels"], groups=test["groups"], scores=scores)
    script = str(Path(__file__).with_name("din_fuxictr.py"))
    ours, theirs = place / "metric-rgalign.json", place / "metric-fuxictr.json"
    command.apart([python, script, "gauc", rows, theirs], threads=1, cwd=ROOT)
    command.apart([sys.executable, "-m", "benchmarks.din_rgalign", "gauc", rows, ours], threads=1, cwd=ROOT)
    a, b = json.loads(ours.read_text()), json.loads(theirs.read_text())
    if abs(a["gauc"] - b["gauc"]) > 1e-9:
        raise UserError(f"the metrics differ on the same rows: {a['gauc']} and {b['gauc']}.")
    return {
        "rows": len(scores),
        "groups": int(test["groups"].max()) + 1,
        "difference": abs(a["gauc"] - b["gauc"]),
        "rgalign_s": a["seconds"],
        "fuxictr_s": b["seconds"],
        "ratio": b["seconds"][0] / a["seconds"][0],
        "ratio_cpu": b["seconds"][1] / a["seconds"][1],
    }


def _show(name: str, result: dict[str, Any]) -> None:
    pairs = result["pairs"]
    table = Table(title=f"DIN on {name}: {pairs['train']:,} training pairs, {pairs['test']:,} test pairs")
    table.add_column("")
    for contender in CONTENDERS:
        table.add_column(contender, justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("pointwise", justify="right")
    columns, ratios = result["contenders"], result["ratios"]

    def row(label: str, show: Any, ratio: str | None = None) -> None:
        ends = [f"{ratios[ours][ratio]:.2f}" if ratio else "" for ours in CONTENDERS[1:]]
        table.add_row(label, *(show(columns[contender]) for contender in CONTENDERS), *ends)

    def spread(key: str, digits: int = 0) -> Any:
        return lambda c: "{:,.{d}f}\n{:,.{d}f} … {:,.{d}f}".format(*c[key], d=digits) if key in c else "–"

    low_high = "{:.4f}\n{:.4f} … {:.4f}"
    row("test GAUC, t-interval", lambda c: low_high.format(c["test_gauc"], *c["test_gauc_interval"]))
    row("samples/s", spread("samples_per_s"), "throughput")
    row("samples/s of CPU", spread("samples_per_cpu_s"), "throughput_cpu")
    row("  without the loader", spread("step_samples_per_cpu_s"), "throughput_cpu_without_their_loader")
    row("validation, s", spread("evaluation_s", 2), "evaluation")
    row("peak memory, MiB", spread("peak_mb"), "memory")
    row("epochs", lambda c: ", ".join(map(str, c["epochs"])))
    row("parameters", lambda c: f"{c['parameters']:,}")
    Console().print(table)
    for ours, (mean, low, high) in result["gauc_difference"].items():
        print(f"GAUC, {ours} − fuxictr: {mean:+.4f} ({low:+.4f} … {high:+.4f} over seeds)")
    metric = result["metric"]
    print(
        f"GAUC of {metric['rows']:,} rows in {metric['groups']:,} groups: {metric['rgalign_s'][0] * 1e3:.1f} ms, "
        f"FuxiCTR {metric['fuxictr_s'][0]:.2f} s: {metric['ratio']:,.0f} times "
        f"({metric['ratio_cpu']:,.0f} by CPU), equal to {metric['difference']:.0e}"
    )


if __name__ == "__main__":
    command.run(compare)
