"""What has to be computed, counted: figures that no other work on the machine can change.

    python -m benchmarks.counts                  # beside those of counts.json
    python -m benchmarks.counts --write          # the figures of counts.json anew, when a change is meant

The suite fails where one is more than a fifth above `counts.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import pyarrow as pa
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reward_model import random_ranker, unit
from rgalign_ray import config, schema
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.reward.judging import query_scores
from rgalign_ray.rollout.worker import Instruction, RolloutWorker, Unit, embedding_table

BASELINE = Path(__file__).with_name("counts.json")
TOLERANCE = 1.2
N, NEW = 8, 16
TEXTS = ["to receive, 7 days", "paid twice", "refund?", "the parcel was returned to the hub, number unknown"]


def counts() -> dict[str, int]:
    """Every figure, of four prompts and N = 8 samples of 16 tokens each, by the tiny model and a shop's ranker."""
    engine = TransformersEngine(config.Reasoner(model="tiny", dtype="float32"), 64)
    engine.stop_ids = set()  # how long a sample is must not depend on what it says
    prompts = Prompts("What would the user ask? " * 4, TEXTS, "\nQuestion:")
    seeds = [[row * N + place for place in range(N)] for row in range(len(TEXTS))]
    sampling = config.Sampling(temperature=1.0, top_p=0.95, max_new_tokens=NEW)
    found: dict[str, int] = {}
    with counted(engine) as first:
        engine.sample(prompts, seeds, sampling)
    with counted(engine) as next_unit:
        groups = engine.sample(prompts, seeds, sampling)
    with counted(engine) as read:
        engine.embed(prompts)
    for what, seen in (("first unit", first), ("next unit", next_unit), ("embeddings", read)):
        found |= {f"{what}: model calls": seen["calls"], f"{what}: tokens computed": seen["tokens"]}
    vectors = embedding_table([f"s{row}" for row in range(len(TEXTS))], groups, engine)
    found["unit: bytes of embeddings"] = vectors.nbytes
    found["unit: bytes of rollouts"] = _rollouts(engine, sampling, groups).nbytes
    batch, embeddings = unit(4, N, 60)
    ranker = random_ranker(embeddings)
    with mock.patch.object(QERec, "users", autospec=True, side_effect=QERec.users) as users:
        query_scores(ranker, batch, embeddings)
    found["reward: user tower calls"] = users.call_count
    found["reward: sessions through the user tower"] = sum(len(call.args[1]["fields"]) for call in users.call_args_list)
    return found


def _rollouts(engine: TransformersEngine, sampling: config.Sampling, groups: list) -> pa.Table:
    settings = config.Rollout(n=N, **sampling.model_dump())
    worker = object.__new__(RolloutWorker)  # as if its engine had just sampled these
    worker.engine, worker.settings, worker.instruction = engine, settings, Instruction("", "", "v1")
    table = worker._rollout_table(Unit([f"s{row}" for row in range(len(TEXTS))], TEXTS), groups)
    assert table.schema.equals(schema.ROLLOUTS)
    return table


@contextmanager
def counted(engine: TransformersEngine) -> Iterator[Counter[str]]:
    """Calls of the model's body, and tokens that it computed."""
    seen: Counter[str] = Counter()

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update({"calls": 1, "tokens": kwargs["input_ids"].numel()})

    hook = engine.model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def main(write: Annotated[bool, typer.Option(help="Take these as the figures to hold.")] = False) -> None:
    """Count, and show the figures beside those of counts.json."""
    found = counts()
    if write:
        BASELINE.write_text(json.dumps(found, indent=2) + "\n")
    held = json.loads(BASELINE.read_text())
    table = Table("figure")
    for name in ("counted", "held"):
        table.add_column(name, justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:,}", f"{held.get(name, 0):,}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
