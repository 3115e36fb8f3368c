"""Where to read a session in an LLM: which layer's states, and of which tokens.

    rgalign compare --config alignment --set compare.seeds=1 --set 'compare.rows=[popularity]'
    python -m benchmarks.reading_depth runs/alignment/seed_0

Nothing is learned: sessions and intents' texts are read each way, the mean over the sessions and that over the intents
are taken off, and the need shall be among the intents that are nearest. Sessions are those of role align, by which no
ranker is judged.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow.compute as pc
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.statistics import stratified_bootstrap
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.world.oracle import Oracle

K = 3
AT_ONCE = 32
DEPTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)
POOLINGS = ("last", "mean")


def measure(
    run_dir: Annotated[str, typer.Argument(help="Folder of a comparison's seed, on the shop.")],
    model: Annotated[str, typer.Option(help="As reasoner.model.")] = "smollm2",
    sessions: Annotated[int, typer.Option(min=2, help="Sessions that are read.")] = 300,
    depth: Annotated[list[float] | None, typer.Option(help="As reasoner.depth; repeatable.")] = None,
    template: Annotated[str, typer.Option(help="As prompt.template.")] = config.Prompt().template,
) -> None:
    """Print how often the need is found, by depth and pooling."""
    table = storage.read_table(storage.join(run_dir, "sessions", "sessions"), filters=pc.field("role") == "align_1")
    table, catalogue = table.sort_by("session_id").slice(0, sessions), Catalogue.load(storage.join(run_dir, "sessions"))
    if len(table) == 0:
        raise DataError(f"{run_dir}: no session has the role align_1; raise roles.align.")
    needs = Oracle.load(storage.join(run_dir, "log")).needs(table["session_id"].to_pylist())
    need, asked = np.array([catalogue.index[intent] for intent in needs]), Template.load(template)
    texts = asked.sessions(table)
    intents = asked.items(catalogue.intents)
    depths = depth or DEPTHS
    out = Table(title=f"{model}, {len(texts)} sessions, need among the nearest {K}", title_justify="left")
    for column in ("depth", *(f"{pooling}, 95 % over users" for pooling in POOLINGS)):
        out.add_column(column, justify="right")
    with progress.track("reading", len(depths) * len(POOLINGS), "ways") as advance:
        for each in depths:
            told = []
            for pooling in POOLINGS:
                reasoner = config.Reasoner.model_validate(
                    {"model": model, "pooling": pooling, "depth": each, "threads": torch.get_num_threads()}
                )
                engine = TransformersEngine(reasoner, config.Prompt().max_session_tokens)
                hits = nearest(_read(engine, asked, texts), _read(engine, asked, intents), need)
                found = stratified_bootstrap([hits], [table["user_id"].to_pylist()], weights=[None])
                told.append(f"{found.mean:.3f} [{found.users[0]:.3f}, {found.users[1]:.3f}]")
                advance(1)
            out.add_row(f"{each:g}", *told)
    Console().print(out)


def nearest(sessions: np.ndarray, intents: np.ndarray, need: np.ndarray) -> np.ndarray:
    """Whether the need is among the K intents whose text is nearest, float64 [S].

    Args:
        sessions, intents: float [S, H], [I, H]
        need: int [S], rows of `intents`.
    """
    apart = [each - each.mean(axis=0) for each in (sessions, intents)]
    texts = apart[1] / np.linalg.norm(apart[1], axis=1, keepdims=True)
    first = np.argsort(-(apart[0] @ texts.T), axis=1)[:, :K]  # a session's length changes no order
    return (first == need[:, None]).any(axis=1).astype(np.float64)


def _read(engine: TransformersEngine, asked: Template, texts: list[str]) -> np.ndarray:
    """float64 [S, H]"""
    parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
    return np.concatenate([engine.embed(Prompts(asked.prefix, part, asked.suffix)) for part in parts]).astype(float)


if __name__ == "__main__":
    command.run(measure)
