"""Objectives on the tiny model, in this process: each improves its own quantity, and a wrong sign would fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_data import rows, sizes

from rgalign_ray import config, schema, storage
from rgalign_ray.learner import contrastive, sft, training
from rgalign_ray.learner.contrastive import info_nce
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=8, upper_layers=1.0))
WORDS = ["slow parcel", "card refused", "broken vase", "new password"]


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training._group_of_one()


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(REASONER, max_session_tokens=64)


def task(folder: Path, objective: str, optimisation: config.Optimisation, **changes: object) -> LearnerTask:
    arguments: dict = {
        "objective": objective,
        "reasoner": REASONER,
        "learner": config.Learner(workers=1, micro_batch=4, zero_stage=2),
        "optimisation": optimisation,
        "weights": None,
        "data": str(folder / "data"),
        "ranker": None,
        "out": str(folder / "out"),
        "version": "tiny+1",
        "seed": 0,
    }
    return LearnerTask(**(arguments | changes))


def selected(engine: TransformersEngine, folder: Path, sessions: int = 32) -> None:
    """Prompts whose right query is a word of the prompt."""
    table = []
    for i in range(sessions):
        word = WORDS[i % len(WORDS)]
        prompt = engine.prompt_ids(Prompts("Q: ", [word], "\nA:"))[0]
        query = engine._ids(f" {word[:4]}\n")
        table.append(
            {
                "session_id": f"s{i:03d}",
                "prompt_ids": prompt,
                "completion_ids": query,
                "query": word,
                "weight": 1.0,
                "rank": 0,
                "rejected": None,
            }
        )
    storage.write_table(str(folder / "data/selected.parquet"), pa.Table.from_pylist(table, schema=schema.SELECTED))


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_rg_sft_lowers_the_loss_of_the_selected_queries(
    engine: TransformersEngine, tmp_path: Path, zero_stage: int
) -> None:
    selected(engine, tmp_path)
    steps = []
    work = task(
        tmp_path,
        "sft",
        config.Sft(lr=1e-2, epochs=4, batch_sessions=8, neftune_alpha=0.0),
        learner=config.Learner(workers=1, micro_batch=4, zero_stage=zero_stage),
    )
    figures = sft.train(work, steps.append)
    assert figures["steps"] == len(steps) == 16
    assert np.mean(figures["loss"][-4:]) < 0.75 * np.mean(figures["loss"][:4])
    before = models.load_base(REASONER)
    after = models.load_reasoner(REASONER, work.out)
    moved = [name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))]
    assert moved
    assert models.version_of(REASONER, work.out) == "tiny+1"


def test_rg_sft_moves_nothing_but_by_the_completion(engine: TransformersEngine, tmp_path: Path) -> None:
    """The loss of a completion that is certain already is nearly zero, whatever the prompt says."""
    selected(engine, tmp_path)
    path = str(tmp_path / "data/selected.parquet")
    table = storage.read_table(path)
    prompts = [[int(t) for t in np.random.default_rng(i).integers(3, 250, 30)] for i in range(len(table))]
    fixed = table.set_column(1, "prompt_ids", pa.array(prompts, pa.list_(pa.int32())))
    fixed = fixed.set_column(2, "completion_ids", pa.array([[5, 5]] * len(table), pa.list_(pa.int32())))
    storage.write_table(path, fixed.select(table.column_names))
    figures = sft.train(task(tmp_path, "sft", config.Sft(lr=2e-2, epochs=8, batch_sessions=8)), lambda n: None)
    assert figures["loss"][-1] < 1.5 < 4 < figures["loss"][0]


@pytest.mark.slow
def test_all_weights_can_be_trained(engine: TransformersEngine, tmp_path: Path) -> None:
    selected(engine, tmp_path)
    whole = config.Reasoner(model="tiny", dtype="float32", lora=None)
    work = task(tmp_path, "sft", config.Sft(lr=1e-2, epochs=2, batch_sessions=8), reasoner=whole)
    figures = sft.train(work, lambda n: None)
    assert figures["loss"][-1] < figures["loss"][0]
    assert models.load_reasoner(whole, work.out).config.hidden_size == 32


@pytest.fixture
def ranker(engine: TransformersEngine, tmp_path: Path) -> str:
    """A QE-Rec whose embeddings are the engine's, so that its query tower reads what RG-CL moves."""
    from dataclasses import asdict

    from rgalign_ray.logs.feature_spec import FeatureSpec
    from rgalign_ray.logs.features import FeatureSpace
    from rgalign_ray.ranker.scoring import meta_of, save

    spec = FeatureSpec.model_validate({"fields": [{"name": "tier", "kind": "categorical"}], "history": {"length": 4}})
    table = pa.table({"tier": ["a", "b"] * 9, "ts": pa.array([None] * 18, schema.TIMESTAMP)})
    space = FeatureSpace.fit(spec, [table.append_column("history", pa.array([[]] * 18, pa.list_(schema.EVENT)))])
    shape = sizes(intents=24, dim=32)
    data = rows(shape, n=240)
    words = engine.embed(Prompts("Q: ", WORDS, "\nA:"))
    need = np.nonzero(data["candidates"] == data["candidates"])[0].reshape(len(data["prompt"]), -1)[:, 0] % len(WORDS)
    data["prompt"] = words[need]
    data["query"] = np.where(data["has_query"][:, None], words[need], np.float16(0))
    data["clicks"] = data["candidates"] == (need * 3)[:, None]
    fit = Fit(
        "qe_rec", shape, config.Ranker(dim=16, heads=2, epochs=6, whitened_dim=4, lr=1e-2), data, None, 0, Group()
    )
    fit.run()
    meta = meta_of(
        fit.model,
        space=space.to_dict(),
        intent_ids=[f"i{i:02d}" for i in range(24)],
        reasoner_version="tiny",
        seed=0,
        figures={},
    )
    assert asdict(shape) == meta.sizes
    save(fit.model, str(tmp_path / "ranker"), meta)
    return str(tmp_path / "ranker")


def test_rg_cl_turns_embeddings_towards_clicked_intents(
    engine: TransformersEngine, ranker: str, tmp_path: Path
) -> None:
    """The clicked intents are others than those the ranker knows for these prompts: only the LLM can move."""
    selected(engine, tmp_path)
    chosen = storage.read_table(str(tmp_path / "data/selected.parquet"))
    completions = [ids if i % 2 else None for i, ids in enumerate(chosen["completion_ids"].to_pylist())]
    positives = pa.table(
        {
            "session_id": chosen["session_id"],
            "prompt_ids": chosen["prompt_ids"],
            "completion_ids": pa.array(completions, pa.list_(pa.int32())),
            "positives": pa.array([[(i + 1) % 4 * 3] for i in range(len(chosen))], pa.list_(pa.int32())),
        }
    )
    storage.write_table(str(tmp_path / "data/positives.parquet"), positives)
    work = task(tmp_path, "contrastive", config.Contrastive(lr=2e-2, epochs=12, batch_sessions=8), ranker=ranker)
    figures = contrastive.train(work, lambda n: None)
    assert figures["sessions"] == 32
    assert np.mean(figures["loss"][-4:]) < np.mean(figures["loss"][:4]) - 0.3
    assert np.mean(figures["accuracy"][-4:]) > np.mean(figures["accuracy"][:4])


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
    settings_ = config.Contrastive(batch_sessions=8)
    work = task(Path("."), "contrastive", settings_, learner=config.Learner(workers=2, micro_batch=2))
    batches = contrastive._Rows.__new__(contrastive._Rows)
    batches.table = pa.table({"session_id": [f"s{i}" for i in range(19)]})
    for epoch in (0, 1):
        seen = [
            row
            for step in range(3)
            for micro in range(work.micro_steps)
            for rank in (0, 1)
            for row in batches.batch(epoch * 3 + step, micro, settings_, work, rank)
        ]
        assert sorted(row for row in seen if row >= 0) == list(range(19))
        assert seen.count(-1) == 24 - 19
