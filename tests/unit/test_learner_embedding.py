"""Objectives of the embedding on the tiny model, in this process: each improves its own quantity.

A session's prompt is a word. The ranker has learned which intent each word means; in the sessions that the
objectives learn from, words mean other intents. The ranker is frozen: only the LLM can move.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray import config, schema, storage
from rgalign_ray.learner import contrastive, embedding, gradient, latent, training
from rgalign_ray.learner.contrastive import info_nce
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.rows import with_embeddings
from rgalign_ray.ranker.scoring import meta_of, save
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.reward import functions
from rgalign_ray.rollout.worker import vectors_table

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=8, upper_layers=1.0))
LEARNER = config.Learner(workers=1, micro_batch=4, zero_stage=2)
WORDS = ["slow parcel", "card refused", "broken vase", "new password"]
INTENTS = [f"i{number:02d}" for number in range(12)]
SESSIONS = 32


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training._group_of_one()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log's knowledge base, a ranker, and a round's sessions and positives."""
    folder = tmp_path_factory.mktemp("round")
    engine = TransformersEngine(REASONER, max_session_tokens=64)
    intents = [{"intent_id": i, "title": i, "description": i, "category": "c"} for i in INTENTS]
    storage.write_table(str(folder / "log/intents.parquet"), pa.Table.from_pylist(intents, schema=schema.INTENTS))
    train_ranker(folder, engine)
    meant = [INTENTS[(i + 1) % len(WORDS) * 3] for i in range(SESSIONS)]
    chosen = sessions(meant)
    storage.write_table(str(folder / "sessions.parquet"), chosen)
    prompts = engine.prompt_ids(Prompts("Q: ", [WORDS[i % len(WORDS)] for i in range(SESSIONS)], "\nA:"))
    positives = {
        "session_id": chosen["session_id"],
        "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
        "completion_ids": pa.array(
            [engine._ids(" it\n") if i % 2 else None for i in range(SESSIONS)], pa.list_(pa.int32())
        ),
        "positives": pa.array([[INTENTS.index(intent)] for intent in meant], pa.list_(pa.int32())),
    }
    storage.write_table(str(folder / "data/positives.parquet"), pa.table(positives))
    return folder


def sessions(clicked: list[str]) -> pa.Table:
    """Sessions that were shown all intents in an order of their own and clicked one."""
    draw = np.random.default_rng(0)
    orders = [draw.permutation(INTENTS).tolist() for _ in clicked]
    return pa.table(
        {
            "session_id": [f"s{i:03d}" for i in range(len(clicked))],
            "ts": pa.array([None] * len(clicked), schema.TIMESTAMP),
            "tier": ["a" if i % 3 else "b" for i in range(len(clicked))],
            "history": pa.array([[]] * len(clicked), pa.list_(schema.EVENT)),
            "candidates": orders,
            "shown": [[True] * len(INTENTS) for _ in clicked],
            "clicks": [[intent == one for intent in order] for order, one in zip(orders, clicked, strict=True)],
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


def task(folder: Path, out: Path, optimisation: config.Embedding, **changes: object) -> LearnerTask:
    arguments: dict = {
        "objective": "embedding",
        "reasoner": REASONER,
        "learner": LEARNER,
        "optimisation": optimisation,
        "weights": None,
        "data": str(folder / "data"),
        "ranker": str(folder / "ranker"),
        "out": str(out),
        "version": "tiny+1",
        "seed": 0,
        "sessions": str(folder / "sessions.parquet"),
        "log": str(folder / "log"),
        "reward": config.Reward(),
    }
    return LearnerTask(**(arguments | changes))


@pytest.mark.parametrize(
    ("objective", "optimisation", "gain"),
    [
        (contrastive, config.Contrastive(lr=2e-2, epochs=12, batch_sessions=8), 0.2),
        (gradient, config.Gradient(lr=2e-2, epochs=12, batch_sessions=8), 0.5),
        (latent, config.Latent(lr=2e-2, epochs=12, batch_sessions=8), 0.5),
    ],
)
def test_each_objective_turns_embeddings_towards_what_was_clicked(
    folder: Path, tmp_path: Path, objective: ModuleType, optimisation: config.Embedding, gain: float
) -> None:
    figures = objective.train(task(folder, tmp_path / "out", optimisation), lambda n: None)
    measure = figures["accuracy" if objective is contrastive else "reward"]
    assert figures["sessions"] == SESSIONS and figures["steps"] == len(measure) == 48
    assert np.mean(measure[-4:]) > np.mean(measure[:4]) + gain
    if objective is not latent:  # whose loss is a stand-in that only its gradient gives a meaning
        assert np.mean(figures["loss"][-4:]) < np.mean(figures["loss"][:4]) - 0.3


def test_the_latent_objective_estimates_the_gradient_of_its_reward(folder: Path, tmp_path: Path) -> None:
    """With many copies and little noise its gradient is that of the reward, which the gradient arm has exactly."""
    table = storage.read_table(str(folder / "data/positives.parquet"))
    exact = gradient.RankingLoss(task(folder, tmp_path, config.Gradient()), table)
    copies = config.Latent(copies=4096, noise=0.05)
    estimate = latent.NoisyCopies(task(folder, tmp_path, copies), table)
    centre = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 32)).astype(np.float32))
    found = []
    for objective in (exact, estimate):
        embeddings = centre.clone().requires_grad_()
        loss, _ = objective(embeddings, [0, 1], 0)
        loss.sum().backward()
        assert embeddings.grad is not None
        found.append(embeddings.grad.flatten(1))
    assert torch.cosine_similarity(*found, dim=-1).min() > 0.95
    assert (found[1].norm(dim=-1) / found[0].norm(dim=-1)).tolist() == pytest.approx([1.0, 1.0], abs=0.15)


def test_noise_is_drawn_by_session_and_step(folder: Path, tmp_path: Path) -> None:
    table = storage.read_table(str(folder / "data/positives.parquet"))
    objective = latent.NoisyCopies(task(folder, tmp_path, config.Latent()), table)
    centre = torch.zeros(2, 1, 1, 4)
    noise = objective._noise([3, 5], 7, centre)
    assert noise.shape == (2, 1, 8, 4)
    torch.testing.assert_close(objective._noise([5, 3], 7, centre), noise.flip(0))
    assert not torch.equal(objective._noise([3, 5], 8, centre), noise)


def test_the_gradient_arm_asks_for_the_reward_of_the_rollouts(folder: Path, tmp_path: Path) -> None:
    """Its log-probability is the `logprob` reward."""
    table = storage.read_table(str(folder / "data/positives.parquet"))
    ranker = embedding.FrozenRanker(task(folder, tmp_path, config.Gradient()), table)
    batch = ranker.batch([0, 1, 2])
    batch["candidates"][0, 8:] = -1  # padding, also where something was clicked
    scores = torch.randn(3, 5, len(INTENTS), generator=torch.Generator().manual_seed(0))
    clicks, exists = batch["clicks"].numpy(), batch["candidates"].numpy() >= 0
    clicked = (clicks & exists).any(axis=1)
    expected = functions.logprob(scores.numpy(), clicks, exists)
    assert gradient.log_probability(scores, batch).numpy()[clicked] == pytest.approx(expected[clicked], rel=1e-5)


@given(seed=st.integers(0, 2**32), width=st.integers(3, 12))
@settings(max_examples=40, deadline=None)
def test_info_nce_equals_a_naive_reference(seed: int, width: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(5, width)) * 3
    positives = random.random((5, width)) < 0.3
    positives[:, 0] = True
    positives[:, -1] = False
    loss, correct = info_nce(torch.from_numpy(logits), torch.from_numpy(positives))
    for row, marks, value, share in zip(logits, positives, loss.tolist(), correct.tolist(), strict=True):
        terms = [-np.log(np.exp(row[i]) / (np.exp(row[i]) + np.exp(row[~marks]).sum())) for i in np.flatnonzero(marks)]
        assert value == pytest.approx(np.mean(terms), rel=1e-9)
        assert share == pytest.approx(np.mean(row[marks] > row[~marks].max()))


def test_a_batch_is_a_function_of_step_and_rank_and_each_session_comes_once_an_epoch() -> None:
    learner = config.Learner(workers=2, micro_batch=2)
    work = task(Path("."), Path("."), config.Contrastive(batch_sessions=8), learner=learner)
    batches = embedding.Rows.__new__(embedding.Rows)
    batches.table = pa.table({"session_id": [f"s{i}" for i in range(19)]})
    for epoch in (0, 1):
        seen = [
            row
            for step in range(3)
            for micro in range(work.micro_steps)
            for rank in (0, 1)
            for row in batches.batch(epoch * 3 + step, micro, work, rank)
        ]
        assert sorted(row for row in seen if row >= 0) == list(range(19))
        assert seen.count(-1) == 24 - 19
