"""How long a rollout worker pauses for new weights, beside a plain copy of the same bytes in memory.

    python -m benchmarks.weight_swap --out runs/swap

    adapter   a LoRA artefact is merged into the matrices that it changes
    whole     all weights are read from an artefact into their places

Times are CPU seconds and wall seconds of one `load`, reading the files included, which a first load has brought into
the page cache. The copy is of the bytes that a load writes: all weights, or the matrices that the adapter changes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

VERSIONS = 2
"""Artefacts of each kind, taken in turn: a load of the weights that are there already might cost less."""


@dataclass(frozen=True)
class Found:
    megabytes: float
    load_s: list[tuple[float, float]]
    """CPU and wall seconds of each."""
    copy_s: list[tuple[float, float]]


def measure(
    out: Annotated[Path, typer.Option(help="Folder of artefacts and results.")],
    model: Annotated[str, typer.Option(help="As reasoner.model.")] = config.Reasoner().model,
    repetitions: Annotated[int, typer.Option(help="Loads of each kind.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Measure both kinds."""
    torch.set_num_threads(threads)
    settings = config.Reasoner(model=model, dtype="float32", threads=threads)
    found = {}
    for kind in ("adapter", "whole"):
        artefacts = [write(settings, out / f"{kind}-{number}", number, kind) for number in range(VERSIONS)]
        found[kind] = one(settings, artefacts, repetitions)
    (out / "weight_swap.json").write_text(
        json.dumps({kind: vars(each) for kind, each in found.items()} | {"model": model, "threads": threads}, indent=2)
    )
    _show(found, model)
    print(out / "weight_swap.json")


def write(settings: config.Reasoner, folder: Path, seed: int, kind: str) -> str:
    """A reasoner artefact with weights of its own."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    base = models.load_base(settings)
    model = base
    if kind == "adapter":
        assert settings.lora is not None
        model = get_peft_model(base, models.lora_config(settings.lora, base.config.num_hidden_layers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(folder, safe_serialization=True)
    models.describe(str(folder), base=settings.model, version=f"{kind}-{seed}", adapter=kind == "adapter")
    return str(folder)


def one(settings: config.Reasoner, artefacts: list[str], repetitions: int) -> Found:
    """Loads of some artefacts in turn, and copies of what they change."""
    engine = TransformersEngine(settings, max_session_tokens=64)
    before = {name: value.clone() for name, value in engine.model.named_parameters()}
    for artefact in artefacts:
        engine.load(artefact)
    changed = {name: value for name, value in engine.model.named_parameters() if not torch.equal(value, before[name])}
    turns = islice(cycle(artefacts), repetitions)
    loads = [_seconds(partial(engine.load, artefact)) for artefact in turns]
    copies = [_seconds(lambda: _copy(before, changed)) for _ in range(repetitions)]
    bytes_ = sum(value.numel() * value.element_size() for value in changed.values())
    return Found(bytes_ / 1e6, loads, copies)


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


def _seconds(act: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.process_time() - cpu, time.perf_counter() - wall


def _show(found: dict[str, Found], model: str) -> None:
    table = Table(title=f"New weights of {model} in the place of the old ones, median (least … most)")
    for column in ("kind", "MB written", "load, ms of CPU", "load, ms", "copy, ms of CPU", "copy, ms", "CPU, times"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, each in found.items():
        ratio = statistics.median(cpu for cpu, _ in each.load_s) / statistics.median(cpu for cpu, _ in each.copy_s)
        cells = [_ms([pair[side] for pair in pairs]) for pairs in (each.load_s, each.copy_s) for side in (0, 1)]
        table.add_row(kind, f"{each.megabytes:,.0f}", *cells, f"{ratio:.1f}")
    Console().print(table)


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e3:.0f} ({min(values) * 1e3:.0f} … {max(values) * 1e3:.0f})"


if __name__ == "__main__":
    command.run(measure)
