"""RG-SFT and RG-DPO on the tiny model, in this process: each improves its own quantity, and a wrong sign would fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import trl.trainer.utils
from learner_data import Counts

from rgalign_ray import config, schema, storage
from rgalign_ray.learner import dpo, sft, token_rows, training
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=8, upper_layers=1.0))
WORDS = ["slow parcel", "card refused", "broken vase", "new password"]


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training.group_of_one()


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
        "pair": None,
        "prompt": config.Prompt(),
        "template": Template.load("shop"),
        "rollout": config.Rollout(),
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
            }
        )
    storage.write_table(str(folder / "data/selected/0.parquet"), pa.Table.from_pylist(table, schema=schema.SELECTED))


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_rg_sft_lowers_the_loss_of_the_selected_queries(
    engine: TransformersEngine, tmp_path: Path, zero_stage: int
) -> None:
    selected(engine, tmp_path)
    host = Counts()
    work = task(
        tmp_path,
        "sft",
        config.Sft(lr=1e-2, epochs=4, batch_sessions=8, neftune_alpha=0.0),
        learner=config.Learner(workers=1, micro_batch=4, zero_stage=zero_stage),
    )
    figures = sft.train(work, host)
    assert figures["steps"] == host.steps == 16
    assert np.mean(figures["loss"][-4:]) < 0.75 * np.mean(figures["loss"][:4])
    before = models.load_base(REASONER)
    after = models.load_reasoner(REASONER, work.out)
    moved = [name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))]
    assert moved
    assert models.version_of(REASONER, work.out) == "tiny+1"


def test_a_round_of_one_step_is_learned_from(engine: TransformersEngine, tmp_path: Path) -> None:
    selected(engine, tmp_path, sessions=8)
    work = task(tmp_path, "sft", config.Sft(lr=1e-2, batch_sessions=8))
    assert sft.train(work, Host())["steps"] == 1
    before, after = models.load_base(REASONER), models.load_reasoner(REASONER, work.out)
    assert any(not torch.equal(weight, before.get_parameter(name)) for name, weight in after.named_parameters())


def test_rg_sft_learns_the_same_of_prompts_that_share_their_beginning(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected(engine, tmp_path)
    shapes, step, curves = [], sft._Queries.training_step, []

    def spy(self: sft._Queries, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        shapes.append(inputs["input_ids"].shape)
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(sft._Queries, "training_step", spy)
    for share in (True, False):
        monkeypatch.setattr(token_rows, "pays", lambda *sizes, share=share: share)
        work = task(tmp_path, f"sft-{share}", config.Sft(lr=1e-2, epochs=2, batch_sessions=8, neftune_alpha=0.0))
        curves.append(sft.train(work, Host())["loss"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    half = len(shapes) // 2
    assert {rows for rows, _ in shapes[:half]} == {1} and {rows for rows, _ in shapes[half:]} == {4}
    assert all(one[1] < 4 * each[1] for one, each in zip(shapes[:half], shapes[half:], strict=True)), "read once"


def test_noise_is_as_large_as_that_of_a_row_by_itself(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NEFTune's is alpha / sqrt(tokens x width) for each number, of the tokens of the longest row."""
    selected(engine, tmp_path, sessions=8)
    largest, uniform = [], torch.Tensor.uniform_

    def spy(self: torch.Tensor, low: float = 0.0, high: float = 1.0, **more: Any) -> torch.Tensor:
        if self.dim() == 3:  # tokens; weights are matrices
            largest.append(float(high))
        return uniform(self, low, high, **more)

    monkeypatch.setattr(torch.Tensor, "uniform_", spy)
    for share in (True, False):
        monkeypatch.setattr(token_rows, "pays", lambda *sizes, share=share: share)
        sft.train(task(tmp_path, f"sft-{share}", config.Sft(lr=1e-9, batch_sessions=8, neftune_alpha=5.0)), Host())
    table = storage.read_table(str(tmp_path / "data/selected/0.parquet")).to_pylist()
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in table)
    assert len(largest) == 4 and largest[:2] == pytest.approx(largest[2:], rel=1e-5)
    assert min(largest) == pytest.approx(5.0 / np.sqrt(longest * 32), rel=1e-5)


def test_rg_sft_moves_nothing_but_by_the_completion(engine: TransformersEngine, tmp_path: Path) -> None:
    """The loss of a completion that is certain already is nearly zero, whatever the prompt says."""
    selected(engine, tmp_path)
    path = str(tmp_path / "data/selected/0.parquet")
    table = storage.read_table(path)
    prompts = [[int(t) for t in np.random.default_rng(i).integers(3, 250, 30)] for i in range(len(table))]
    fixed = table.set_column(1, "prompt_ids", pa.array(prompts, pa.list_(pa.int32())))
    fixed = fixed.set_column(2, "completion_ids", pa.array([[5, 5]] * len(table), pa.list_(pa.int32())))
    storage.write_table(path, fixed.select(table.column_names))
    figures = sft.train(task(tmp_path, "sft", config.Sft(lr=2e-2, epochs=8, batch_sessions=8)), Host())
    assert figures["loss"][-1] < 1.5 < 4 < figures["loss"][0]


@pytest.mark.parametrize(("objective", "each"), [("sft", 1), ("dpo", 4)], ids=["sft", "dpo"])
def test_only_tokens_that_have_a_loss_meet_the_vocabulary(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, each: int
) -> None:
    """RG-DPO reads two completions, with the policy and with the reference."""
    projected = []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply

    def spy(hidden: torch.Tensor, *arguments: object) -> object:
        projected.append(len(hidden))
        return apply(hidden, *arguments)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", spy)
    paired(engine, tmp_path)
    optimisation = {"sft": config.Sft(batch_sessions=8), "dpo": config.Dpo(batch_sessions=8)}[objective]
    {"sft": sft, "dpo": dpo}[objective].train(task(tmp_path, objective, optimisation), Host())
    table = storage.read_table(str(tmp_path / "data/selected/0.parquet"))
    assert sum(projected) == each * sum(len(ids) for ids in table["completion_ids"].to_pylist())


@pytest.mark.slow
def test_all_weights_can_be_trained(engine: TransformersEngine, tmp_path: Path) -> None:
    selected(engine, tmp_path)
    whole = config.Reasoner(model="tiny", dtype="float32", lora=None)
    work = task(tmp_path, "sft", config.Sft(lr=1e-2, epochs=2, batch_sessions=8), reasoner=whole)
    figures = sft.train(work, Host())
    assert figures["loss"][-1] < figures["loss"][0]
    assert models.load_reasoner(whole, work.out).config.hidden_size == 32


def paired(engine: TransformersEngine, folder: Path) -> None:
    """The right query against that of the next session."""
    selected(engine, folder)
    table = storage.read_table(str(folder / "data/selected/0.parquet"))
    chosen = table["completion_ids"].to_pylist()
    columns = [table["session_id"], table["prompt_ids"], table["completion_ids"]]
    rejected = pa.array(chosen[1:] + chosen[:1], pa.list_(pa.int32()))
    gaps = pa.array(np.ones(len(table)), pa.float32())
    storage.write_table(str(folder / "data/pairs/0.parquet"), pa.table([*columns, rejected, gaps], schema=schema.PAIRS))


@pytest.mark.parametrize(
    ("lora", "zero_stage"),
    [
        (REASONER.lora, 2),
        pytest.param(REASONER.lora, 3, marks=pytest.mark.slow),
        pytest.param(None, 2, marks=pytest.mark.slow),
    ],
)
def test_rg_dpo_parts_the_chosen_from_the_rejected(
    engine: TransformersEngine, tmp_path: Path, lora: config.Lora | None, zero_stage: int
) -> None:
    paired(engine, tmp_path)
    reasoner = config.Reasoner(model="tiny", dtype="float32", lora=lora)
    work = task(
        tmp_path,
        "dpo",
        config.Dpo(lr=1e-2, epochs=4, batch_sessions=8),
        reasoner=reasoner,
        learner=config.Learner(workers=1, micro_batch=4, zero_stage=zero_stage),
    )
    figures = dpo.train(work, Host())
    assert figures["steps"] == 16
    assert figures["loss"][0] == pytest.approx(np.log(2), abs=0.01), "at first it is its own reference"
    assert np.mean(figures["loss"][-4:]) < 0.5
    assert np.mean(figures["margin"][-4:]) > 0.5
    assert np.mean(figures["accuracy"][-4:]) > 0.9
    assert models.version_of(reasoner, work.out) == "tiny+1"
    assert not (tmp_path / "out/ref").exists(), "the reference is not part of the reasoner"


def test_rg_dpo_goes_on_from_what_the_objective_before_it_made(engine: TransformersEngine, tmp_path: Path) -> None:
    """Its reference is that reasoner, not the base model: the first step's loss tells."""
    paired(engine, tmp_path)
    first = task(tmp_path, "sft", config.Sft(lr=1e-2, epochs=2, batch_sessions=8, neftune_alpha=0.0))
    sft.train(first, Host())
    second = task(
        tmp_path,
        "dpo",
        config.Dpo(lr=1e-6, batch_sessions=8),
        weights=first.out,
        out=str(tmp_path / "second"),
        version="tiny+1.dpo",
    )
    figures = dpo.train(second, Host())
    assert figures["loss"] == pytest.approx([np.log(2)] * 4, abs=0.01)
    before, after = (models.load_reasoner(REASONER, uri) for uri in (first.out, second.out))
    base = models.load_base(REASONER)
    name = next(name for name, w in before.named_parameters() if not torch.equal(w, base.get_parameter(name)))
    moved = (before.get_parameter(name) - base.get_parameter(name)).norm()
    assert (after.get_parameter(name) - before.get_parameter(name)).norm() < 0.1 * moved
