"""What objectives spare by reading once what the prompts of a micro-batch begin with.

    rgalign loop --config demo
    python -m benchmarks.shared_prefix runs/demo/selected_1/positives

One optimiser step's passes, forward and back, over the same sessions with their queries: a row for each, padded, and
all in one row. Both are done in turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, storage
from rgalign_ray.learner import token_rows
from rgalign_ray.learner.embedding import Reader
from rgalign_ray.learner.token_rows import TokenRows
from rgalign_ray.reasoner import models


def measure(
    positives: Annotated[str, typer.Argument(help="What a round aligned on, as runs/demo/selected_1/positives.")],
    model: Annotated[str, typer.Option(help="As reasoner.model.")] = "smollm2",
    sessions: Annotated[int, typer.Option(min=1, help="Sessions of an optimiser step.")] = 16,
    micro_batch: Annotated[list[int] | None, typer.Option(help="As learner.micro_batch; repeatable.")] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Time both ways, in float32 with LoRA's defaults."""
    torch.set_num_threads(threads)
    table = storage.read_table(positives).sort_by("session_id").slice(0, sessions).to_pylist()
    rows = [row["prompt_ids"] + (row["completion_ids"] or []) for row in table]
    prompts = [len(row["prompt_ids"]) for row in table]
    reader, pad = _reader(model), models.load_tokenizer(model).pad_token_id
    device = torch.device("cpu")
    out = Table(title=f"{model}, {len(table)} sessions, {threads} threads, {repetitions} times", title_justify="left")
    for column in ("micro-batch", "apart, s", "together, s", "together ÷ apart", "tokens together ÷ apart"):
        out.add_column(column, justify="right")
    for size in micro_batch or (1, 2, 4, 8, 16):
        parts = [slice(start, start + size) for start in range(0, len(table), size)]
        ways = {
            "apart": [token_rows.apart(rows[part], pad, device) for part in parts],
            "together": [token_rows.together(rows[part], token_rows.alike(rows[part]), device) for part in parts],
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for repetition in range(repetitions + 1):
            for way, passes in ways.items():
                seconds = _step(reader, passes, [prompts[part] for part in parts])
                if repetition:  # the first warms up
                    taken[way].append(seconds)
        apart, together = (statistics.median(each) for each in taken.values())
        told = [f"{statistics.median(each):.1f} ({min(each):.1f} … {max(each):.1f})" for each in taken.values()]
        tokens = [sum(laid.inputs["input_ids"].numel() for laid in passes) for passes in ways.values()]
        out.add_row(str(size), *told, f"{together / apart:.2f}", f"{tokens[1] / tokens[0]:.2f}")
    Console().print(out)


def _reader(model: str) -> Reader:
    settings = config.Reasoner(model=model, dtype="float32")
    base = models.load_base(settings)
    assert settings.lora is not None
    lora = models.lora_config(settings.lora, base.config.num_hidden_layers)
    return Reader(get_peft_model(base, lora).train(), settings)


def _step(reader: Reader, passes: list[TokenRows], prompts: list[list[int]]) -> float:
    """Seconds of the passes of one optimiser step."""
    began = time.perf_counter()
    for laid, lengths in zip(passes, prompts, strict=True):
        places = torch.tensor([laid.place(row, length - 1) for row, length in enumerate(lengths)])
        embeddings, _ = reader(laid.inputs, torch.arange(len(places)), places, torch.ones(len(places), 1))
        embeddings.square().mean().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    command.run(measure)
