"""The reward of N queries a session at once, beside one query a call; and its share of a rollout step.

    python -m benchmarks.reward_model --out runs/reward

    at once     `reward.judging`: user and item towers once a session, all N queries and the null query in one pass
    one a call  the ranker asked for one session and one query at a time, towers and all, as a remote scorer would be
    sampling    the reasoner sampling the same unit's queries

Weights and inputs are random: neither changes what has to be computed. Both scores must agree, or the benchmark stops.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress
from rgalign_ray.errors import UserError
from rgalign_ray.ranker.base import Batch
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.reward.judging import query_scores

SHOP = Sizes(
    field_size=2000,
    num_fields=89,
    multi_size=200,
    num_multi=3,
    multi_length=8,
    history_size=400,
    history_length=20,
    num_intents=87,
    embedding_dim=576,
    item_dim=64,
    match_dim=86,
)
"""About those of the simulated shop, read by SmolLM2."""
AGREE = 1e-5
TEXT = 'order shipped, delayed, 7 days; typed "where is my parcel"; did view tracking, contact courier, view order'


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    sessions: Annotated[int, typer.Option(min=1, help="Of a work unit.")] = 16,
    n: Annotated[int, typer.Option(min=1, help="Queries a session.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, max=87, help="Intents a session.")] = 60,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    model: Annotated[str, typer.Option(help="As reasoner.model.")] = "smollm2",
) -> None:
    """Measure all three in one thread, and print ratios."""
    torch.set_num_threads(1)
    batch, embeddings = unit(sessions, n, candidates)
    ranker = random_ranker(embeddings)
    found = {}
    paths: dict[str, Callable[[], np.ndarray]] = {
        "at once": lambda: query_scores(ranker, batch, embeddings),
        "one a call": lambda: one_a_call(ranker, batch, embeddings),
    }
    apart = float(np.abs(paths["at once"]()[:, :n] - paths["one a call"]()).max())
    if apart > AGREE:
        raise UserError(f"the scores of both ways are up to {apart:.2g} apart; expected less than {AGREE:g}.")
    with progress.track("reward", (len(paths) + 1) * repetitions, "measurements") as advance:
        for name, path in paths.items():
            found[name] = [_cpu_seconds(path, advance) for _ in range(repetitions)]
        engine = TransformersEngine(config.Reasoner(model=model), 64)
        prompts = Prompts("What would the user ask?\n", [f"{row} {TEXT}" for row in range(sessions)], "\nQuestion:")
        seeds = [[row * n + place for place in range(n)] for row in range(sessions)]
        sampling = config.Sampling(temperature=0.7, top_p=0.95, max_new_tokens=16)
        engine.sample(prompts, seeds, sampling)
        found["sampling"] = [
            _cpu_seconds(lambda: engine.sample(prompts, seeds, sampling), advance) for _ in range(repetitions)
        ]
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int | str] = {"sessions": sessions, "n": n, "candidates": candidates, "model": model}
    (out / "reward_model.json").write_text(json.dumps(sizes | {"cpu_s": found}, indent=2))
    _show(found, sizes)
    print(out / "reward_model.json")


def unit(sessions: int, n: int, candidates: int) -> tuple[Batch, torch.Tensor]:
    """A work unit's sessions and the embeddings [S, N, De] of their queries."""
    draw = np.random.default_rng(0)
    rows = {
        "fields": draw.integers(SHOP.field_size, size=(sessions, SHOP.num_fields)),
        "multi": draw.integers(SHOP.multi_size, size=(sessions, SHOP.num_multi, SHOP.multi_length)),
        "history": draw.integers(1, SHOP.history_size, size=(sessions, SHOP.history_length)),
        "candidates": np.stack([draw.permutation(SHOP.num_intents)[:candidates] for _ in range(sessions)]),
    }
    batch = {name: torch.from_numpy(values.astype(np.int32)) for name, values in rows.items()}
    return batch, torch.from_numpy(draw.normal(size=(sessions, n, SHOP.embedding_dim)).astype(np.float32))


def random_ranker(embeddings: torch.Tensor) -> QERec:
    """One that reads the embeddings: as a fresh one is, its gates are shut and its whitening is of nothing."""
    torch.manual_seed(0)
    ranker = QERec(SHOP, config.Ranker()).eval()
    for parameter in ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    told = embeddings.flatten(0, 1).numpy()
    ranker.fit_queries(Moments.of(told), Moments.of(told[:0]))
    return ranker


@torch.inference_mode()
def one_a_call(ranker: QERec, batch: Batch, embeddings: torch.Tensor) -> np.ndarray:
    """Scores [S, N, C] of one session and one query at a time."""
    scores = [
        ranker({name: values[row : row + 1] for name, values in batch.items()}, embeddings[row : row + 1, place])
        for row in range(len(embeddings))
        for place in range(embeddings.shape[1])
    ]
    return torch.cat(scores).view(*embeddings.shape[:2], -1).numpy()


def _cpu_seconds(path: Callable[[], object], advance: progress.Advance) -> float:
    started = time.process_time()
    path()
    advance(1)
    return time.process_time() - started


def _show(found: dict[str, list[float]], sizes: dict[str, int | str]) -> None:
    table = Table(title="{sessions} sessions x {n} queries x {candidates} candidates, one thread".format(**sizes))
    table.add_column("path")
    table.add_column("ms of CPU", justify="right")
    table.add_column("least … most", justify="right")
    for name, seconds in found.items():
        least, most = min(seconds) * 1e3, max(seconds) * 1e3
        table.add_row(name, f"{statistics.median(seconds) * 1e3:,.0f}", f"{least:,.0f} … {most:,.0f}")
    Console().print(table)
    at_once, apart, sampling = (statistics.median(found[name]) for name in ("at once", "one a call", "sampling"))
    share = at_once / (sampling + at_once)
    print(f"one a call / at once: {apart / at_once:.1f}; at once / (sampling + at once): {share:.1%}")


if __name__ == "__main__":
    command.run(measure)
