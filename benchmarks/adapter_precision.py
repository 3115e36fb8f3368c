"""What is left in bfloat16 of what an adapter does to e(x): its sums rounded to the nearest, or at random.

    rgalign loop --config demo
    python -m benchmarks.adapter_precision runs/demo/align_1_gradient runs/demo/sessions

The movement of e(x) that the adapter makes in float32 is what is wanted. Beside it stands what bfloat16 alone does to
e(x), without an adapter: less than that is not to be told from nothing.
"""

from __future__ import annotations

from typing import Annotated
from unittest.mock import patch

import numpy as np
import pyarrow.compute as pc
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, storage
from rgalign_ray.evaluate.diagnosis import common, moved
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine


def measure(
    adapter: Annotated[str, typer.Argument(help="A reasoner artefact, as runs/demo/align_1_gradient.")],
    sessions: Annotated[str, typer.Argument(help="The run's sessions, of which those of role valid are read.")],
    count: Annotated[int, typer.Option("--sessions", help="So many of them.")] = 64,
    template: Annotated[str, typer.Option(help="As prompt.template.")] = config.Prompt().template,
) -> None:
    """Reads the same sessions in both precisions, with the adapter and without."""
    table = storage.read_table(storage.join(sessions, "sessions"), filters=pc.field("role") == "valid")
    asked = Template.load(template)
    texts = asked.sessions(table.sort_by("session_id").slice(0, count))
    found = read(adapter, Prompts(asked.prefix, texts, asked.suffix))
    out = Table(title=f"{adapter}, {len(texts)} sessions", title_justify="left")
    for column in ("e(x) of", "all movement kept", "between sessions kept", "moved apart, of the distance between two"):
        out.add_column(column, justify="right" if out.columns else "left")
    base, whole = found["float32"], found["float32, adapter"] - found["float32"]
    for name, half in (("nearest", "bfloat16, adapter to the nearest"), ("random", "bfloat16, adapter at random")):
        way = found[half] - found["bfloat16"]
        apart, wanted = way - way.mean(axis=0), whole - whole.mean(axis=0)
        shares = (f"{kept(way, whole):.0%}", f"{kept(apart, wanted):.0%}")
        out.add_row(f"bfloat16, rounded {name}", *shares, f"{moved(found['bfloat16'], found[half]):.3f}")
    out.add_row("float32", "100%", "100%", f"{moved(base, base + whole):.3f}")
    out.add_row("bfloat16, no adapter", "", "", f"{moved(base, found['bfloat16']):.3f}")
    Console().print(out)
    print(f"the same for all sessions: {common(base, base + whole):.0%} of the movement in float32")


def read(adapter: str, prompts: Prompts) -> dict[str, np.ndarray]:
    """e(x) float64 [S, H] of the same prompts, each way."""
    base = storage.read_json(storage.join(adapter, models.DESCRIPTION))["base"]
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = config.Reasoner(model=base, dtype=dtype, threads=torch.get_num_threads())
        engine = TransformersEngine(settings, config.Prompt().max_session_tokens)
        found[dtype] = engine.embed(prompts).astype(np.float64)
        engine.load(adapter)
        name = "float32, adapter" if dtype == "float32" else "bfloat16, adapter at random"
        found[name] = engine.embed(prompts).astype(np.float64)
    with patch.object(models, "rounded", lambda values, draw: values.to(torch.bfloat16)):
        engine.load(adapter)
    return found | {"bfloat16, adapter to the nearest": engine.embed(prompts).astype(np.float64)}


def kept(movement: np.ndarray, wanted: np.ndarray) -> float:
    """Share of a movement [S, H] that another one has of it, by projection."""
    return float((movement * wanted).sum() / (wanted**2).sum())


if __name__ == "__main__":
    command.run(measure)
