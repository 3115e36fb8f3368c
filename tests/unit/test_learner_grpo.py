"""RG-GRPO on the tiny model, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_data import SESSIONS, WORDS, task, write_round

from rgalign_ray import config, schema, storage
from rgalign_ray.learner import grpo, sft, training
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=None)
GRPO = config.Grpo(lr=3e-3, epochs=5, batch_sessions=8, temperature=1.0, kl_weight=0.0)


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training.group_of_one()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LearnerTask:
    """A round, and a reasoner that answers every prompt with one of four queries, whatever the prompt."""
    folder = tmp_path_factory.mktemp("round")
    write_round(folder)
    of = TransformersEngine(REASONER, max_session_tokens=64)
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
    storage.write_table(str(folder / "data/selected/0.parquet"), pa.Table.from_pylist(rows, schema=schema.SELECTED))
    settings = config.Sft(lr=1e-2, epochs=12, batch_sessions=8, neftune_alpha=0.0)
    first = task(folder, folder / "sft", settings, reasoner=REASONER)
    assert sft.train(first, lambda n: None)["loss"][-1] < 0.4
    return replace(first, weights=first.out, optimisation=GRPO, rollout=config.Rollout(max_new_tokens=8))


def test_the_mean_reward_of_what_is_sampled_grows(start: LearnerTask, tmp_path: Path) -> None:
    work = replace(start, out=str(tmp_path / "out"), version="tiny+1.grpo")
    figures = grpo.train(work, lambda n: None)
    assert figures["sessions"] == SESSIONS and figures["steps"] == 20
    assert np.mean(figures["reward"][-4:]) > np.mean(figures["reward"][:4]) + 0.4
    assert min(figures["valid_rate"]) > 0.8
    assert max(figures["clipped"]) < 0.05, "it learns from what it has just sampled itself"
    assert "kl" not in figures
    assert models.version_of(REASONER, work.out) == "tiny+1.grpo"


def test_samples_of_other_weights_are_corrected(
    start: LearnerTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL by itself takes every sample for its own, with a ratio of exactly 1."""
    sampled = grpo.Rollouts.__call__

    def stale(self: grpo.Rollouts, prompts: list[str], of: object) -> dict[str, list]:
        rollouts = sampled(self, prompts, of)  # type: ignore[arg-type]
        return rollouts | {"logprobs": [[value - 0.5 for value in row] for row in rollouts["logprobs"]]}

    monkeypatch.setattr(grpo.Rollouts, "__call__", stale)
    settings = GRPO.model_copy(update={"epochs": 1, "lr": 1e-6, "kl_weight": 0.1})
    figures = grpo.train(replace(start, out=str(tmp_path / "out"), optimisation=settings), lambda n: None)
    assert max(figures["clipped"]) > 0.2, "a ratio of e^0.5 is out of range wherever the advantage is positive"
    assert figures["kl"] == pytest.approx([0.0] * 4, abs=1e-3), "it has not moved from where it starts"


def test_an_epochs_last_batch_is_filled_up_and_samples_anew(start: LearnerTask, tmp_path: Path) -> None:
    settings = GRPO.model_copy(update={"epochs": 1, "batch_sessions": 20})
    work = replace(start, out=str(tmp_path / "out"), optimisation=settings)
    figures = grpo.train(work, lambda n: None)
    assert figures["sessions"] == SESSIONS and figures["steps"] == 2
    rollouts = grpo.Rollouts(work)
    groups = rollouts.sample(models.load_reasoner(REASONER, start.weights), [3, 4, 3], step=0)
    first, other, again = ([sample.seed for sample in group.samples] for group in groups)
    assert not set(first) & set(again) and not set(first) & set(other)


def test_what_must_not_be_judged_counts_as_the_worst_of_its_group() -> None:
    nan = float("nan")
    rewards = torch.tensor([[-1.0, nan, -3.0], [nan, nan, nan], [-2.0, -2.0, -1.0]])
    expected = torch.tensor([[-1.0, -3.0, -3.0], [nan, nan, nan], [-2.0, -2.0, -1.0]])
    torch.testing.assert_close(grpo.at_worst(rewards), expected, equal_nan=True)
