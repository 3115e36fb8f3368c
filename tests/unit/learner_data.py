"""A round of alignment for the tiny model.

A session's prompt is a word. The ranker has learned which intent each word means; in the round's sessions
words mean other intents. The ranker is frozen: only the LLM can move.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rgalign_ray import config, schema, storage
from rgalign_ray.learner.engine import FrozenPair, Host, LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.prompts import Template
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.rows import with_embeddings
from rgalign_ray.ranker.scoring import meta_of, save
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.rollout.worker import vectors_table

REASONER = config.Reasoner(model="tiny", dtype="float32", depth=0.5, lora=config.Lora(rank=8, upper_layers=1.0))
LEARNER = config.Learner(workers=1, micro_batch=4, zero_stage=2)
OBJECTIVES: dict[str, config.Optimisation] = {
    "sft": config.Sft(lr=1e-2, batch_sessions=8, neftune_alpha=0.0),
    "dpo": config.Dpo(lr=1e-3, batch_sessions=8),
    "grpo": config.Grpo(lr=1e-3, batch_sessions=8, n=4, temperature=1.0),
    "contrastive": config.Contrastive(lr=1e-2, batch_sessions=8),
    "gradient": config.Gradient(lr=1e-2, batch_sessions=8),
    "latent": config.Latent(lr=1e-2, batch_sessions=8),
}
WORDS = ["slow parcel", "card refused", "broken vase", "new password"]
INTENTS = [f"i{number:02d}" for number in range(12)]
SESSIONS = 32
TEMPLATE = Template(version="words", prefix="Q: ", session="{{ word }}", suffix="\nA:", item="{{ title }}")


class Counts(Host):
    """Counts optimiser steps, and goes on from a state if it is told of one."""

    def __init__(self, resume_from: str | None = None) -> None:
        self.resume_from = resume_from
        self.steps = 0

    def advance(self, steps: int) -> None:
        self.steps += steps


def write_round(folder: Path, count: int = SESSIONS, reasoner: config.Reasoner = REASONER) -> None:
    """A log's knowledge base, a ranker that reads the reasoner, and a round's sessions and positives."""
    engine = TransformersEngine(reasoner, max_session_tokens=64)
    intents = [{"intent_id": i, "title": i, "description": i, "category": "c"} for i in INTENTS]
    storage.write_table(str(folder / "log/intents.parquet"), pa.Table.from_pylist(intents, schema=schema.INTENTS))
    train_ranker(folder, engine)
    meant = [INTENTS[(i + 1) % len(WORDS) * 3] for i in range(count)]
    chosen = sessions(meant)
    storage.write_table(str(folder / "sessions.parquet"), chosen)
    prompts = engine.prompt_ids(Prompts("Q: ", [WORDS[i % len(WORDS)] for i in range(count)], "\nA:"))
    positives = {
        "session_id": chosen["session_id"],
        "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
        "completion_ids": pa.array(
            [engine._ids(" it\n") if i % 2 else None for i in range(count)], pa.list_(pa.int32())
        ),
        "positives": pa.array([[INTENTS.index(intent)] for intent in meant], pa.list_(pa.int32())),
    }
    storage.write_table(str(folder / "data/positives/0.parquet"), pa.table(positives))


def sessions(clicked: list[str]) -> pa.Table:
    """Sessions that were shown all intents in an order of their own and clicked one."""
    draw = np.random.default_rng(0)
    orders = [draw.permutation(INTENTS).tolist() for _ in clicked]
    clicks = [[intent == one for intent in order] for order, one in zip(orders, clicked, strict=True)]
    return pa.table(
        {
            "session_id": [f"s{i:03d}" for i in range(len(clicked))],
            "user_id": [f"u{i:03d}" for i in range(len(clicked))],
            "ts": pa.array([None] * len(clicked), schema.TIMESTAMP),
            "word": [WORDS[i % len(WORDS)] for i in range(len(clicked))],
            "tier": ["a" if i % 3 else "b" for i in range(len(clicked))],
            "history": pa.array([[]] * len(clicked), pa.list_(schema.EVENT)),
            "candidates": orders,
            "shown": [[True] * len(INTENTS) for _ in clicked],
            "clicks": clicks,
            "resolved": [row if i % 2 else [False] * len(row) for i, row in enumerate(clicks)],
        }
    )


def train_ranker(folder: Path, engine: TransformersEngine, n: int = 160) -> None:
    """A QE-Rec that reads the engine's embeddings; word w means intent 3·w."""
    table = sessions([INTENTS[i % len(WORDS) * 3] for i in range(n)])
    spec = FeatureSpec.model_validate({"fields": [{"name": "tier", "kind": "categorical"}], "history": {"length": 4}})
    space = FeatureSpace.fit(spec, [table])
    words = engine.embed(Prompts("Q: ", WORDS, "\nA:"))
    vectors = words[np.arange(n) % len(WORDS)]
    ids = table["session_id"].to_pylist()
    read = [(readout, -1 + (readout == "query")) for readout in ("prompt", "query")]
    tables = [
        vectors_table(ids, [readout] * n, [sample] * n, [None] * n, vectors, engine.version) for readout, sample in read
    ]
    storage.write_table(str(folder / "embeddings/all.parquet"), pa.concat_tables(tables))
    read_by_ranker = Embeddings.load(str(folder / "embeddings"))
    rows = with_embeddings(examples(table, space, Catalogue.load(str(folder / "log"))), read_by_ranker)
    rows["valid"] = np.arange(n) % 5 == 0
    sizes = Sizes.of(space, num_intents=len(INTENTS), embedding_dim=read_by_ranker.dim, item_dim=0)
    ranker = config.Ranker(dim=16, heads=2, epochs=8, whitened_dim=4, lr=1e-2, batch_sessions=16)
    fit = Fit("qe_rec", sizes, ranker, rows, None, seed=0, group=Group())
    figures = fit.run()
    assert figures["best_gauc"] > 0.99
    meta = meta_of(
        fit.model, space=space.to_dict(), intent_ids=INTENTS, reasoner_version=engine.version, seed=0, figures={}
    )
    save(fit.model, str(folder / "ranker"), meta)


def task(folder: Path, out: Path, optimisation: config.Optimisation, **changes: object) -> LearnerTask:
    arguments: dict = {
        "objective": "embedding",
        "reasoner": REASONER,
        "learner": LEARNER,
        "optimisation": optimisation,
        "weights": None,
        "data": str(folder / "data"),
        "out": str(out),
        "version": "tiny+1",
        "seed": 0,
        "pair": FrozenPair(
            rankers=(str(folder / "ranker"),),
            encoder=None,
            sessions=str(folder / "sessions.parquet"),
            log=str(folder / "log"),
            reward=config.Reward(),
        ),
        "prompt": config.Prompt(template="not here.yaml"),
        "template": TEMPLATE,
        "rollout": config.Rollout(max_new_tokens=4),
    }
    return LearnerTask(**(arguments | changes))


def write_writer(folder: Path, reasoner: config.Reasoner) -> dict[str, Any]:
    """A reasoner that answers every prompt with one of four queries, whatever the prompt: what a task starts from."""
    from rgalign_ray.learner import sft

    of = TransformersEngine(reasoner, max_session_tokens=64)
    prompts = storage.read_table(str(folder / "data/positives/0.parquet"))["prompt_ids"].to_pylist()
    rows = [
        {
            "session_id": f"s{i:03d}",
            "prompt_ids": prompts[i % SESSIONS],
            "completion_ids": of._ids(f" {WORDS[i // 8 % 4][:4]}\n"),
            "query": "q",
            "weight": 1.0,
            "rank": 0,
        }
        for i in range(2 * SESSIONS)
    ]
    storage.write_table(str(folder / "writer/selected/0.parquet"), pa.Table.from_pylist(rows, schema=schema.SELECTED))
    settings = config.Sft(lr=1e-2, epochs=12, batch_sessions=8, neftune_alpha=0.0)
    first = task(folder, folder / "writer/out", settings, reasoner=reasoner, data=str(folder / "writer"))
    assert sft.train(first, Host())["loss"][-1] < 0.4
    return {"weights": first.out, "rollout": config.Rollout(max_new_tokens=8)}


def write_choices(folder: Path) -> None:
    """What the objectives of the text learn from: the same query for all, and another as the worse one."""
    positives = storage.read_table(str(folder / "data/positives/0.parquet"))
    query = pa.array([[40, 41, 42, 2]] * len(positives), pa.list_(pa.int32()))
    other = pa.array([[50, 51, 2]] * len(positives), pa.list_(pa.int32()))
    ones = pa.array([1.0] * len(positives), pa.float32())
    shared = [positives["session_id"], positives["prompt_ids"], query]
    ranks = pa.array([0] * len(positives), pa.int32())
    selected = pa.table([*shared, pa.array(["q"] * len(positives)), ones, ranks], schema=schema.SELECTED)
    storage.write_table(str(folder / "data/selected/0.parquet"), selected)
    storage.write_table(str(folder / "data/pairs/0.parquet"), pa.table([*shared, other, ones], schema=schema.PAIRS))
