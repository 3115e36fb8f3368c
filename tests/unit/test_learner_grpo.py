"""RG-GRPO on the tiny model, in this process."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_data import SESSIONS, WORDS, task, write_round, write_writer
from transformers import PreTrainedModel

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.learner import engine, groups, grpo, sft, training
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Group, Sample
from rgalign_ray.reward.functions import Labels
from rgalign_ray.reward.judging import judge_queries

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=None, pooling="last", depth=1.0)
"""Of which a query's last token is all that the reward hears: what it says soon shows."""
GRPO = config.Grpo(lr=3e-3, epochs=5, batch_sessions=8, temperature=1.0, kl_weight=0.0)


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training.group_of_one()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LearnerTask:
    folder = tmp_path_factory.mktemp("round")
    write_round(folder, reasoner=REASONER)
    return replace(task(folder, folder / "out", GRPO, reasoner=REASONER), **write_writer(folder, REASONER))


def test_the_mean_reward_of_what_is_sampled_grows(start: LearnerTask, tmp_path: Path) -> None:
    work = replace(start, out=str(tmp_path / "out"), version="tiny+1.grpo")
    figures = grpo.train(work, Host())
    assert figures["sessions"] == SESSIONS and figures["steps"] == 20
    assert np.mean(figures["reward"][-4:]) > np.mean(figures["reward"][:4]) + 0.4
    assert min(figures["valid_rate"]) > 0.8
    assert max(figures["clipped"]) < 0.05, "it learns from what it has just sampled itself"
    assert "kl" not in figures
    assert models.version_of(REASONER, work.out) == "tiny+1.grpo"


def test_the_reference_is_there_where_weights_come_from_an_object_store(
    start: LearnerTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose folders are copied for as long as they are asked for."""

    @contextmanager
    def local_copy(uri: str) -> Iterator[str]:
        if uri != start.weights:  # a folder already
            yield uri
            return
        with TemporaryDirectory() as folder:
            yield shutil.copytree(uri, folder, dirs_exist_ok=True)

    monkeypatch.setattr(models, "local_copy", local_copy)
    settings = GRPO.model_copy(update={"epochs": 1, "kl_weight": 0.1})
    figures = grpo.train(replace(start, out=str(tmp_path / "out"), optimisation=settings), Host())
    assert figures["kl"][0] == pytest.approx(0.0, abs=1e-3), "it starts from its reference"


def test_a_judge_is_a_pair_and_its_ranker_knows_its_reasoner(start: LearnerTask) -> None:
    assert start.pair is not None
    with pytest.raises(DataError, match=r"embeddings are of reasoner '.*', but ranker .* was trained on 'tiny'"):
        groups.Judge(replace(start, pair=replace(start.pair, encoder=start.weights)))


def test_the_reference_holds_the_policy_back(start: LearnerTask, tmp_path: Path) -> None:
    moved = {}
    for weight in (0.01, 3.0):
        settings = GRPO.model_copy(update={"epochs": 2, "kl_weight": weight})
        work = replace(start, out=str(tmp_path / f"out-{weight}"), optimisation=settings)
        moved[weight] = np.mean(grpo.train(work, Host())["kl"][-4:])
    assert moved[0.01] > 0.05 and moved[3.0] < moved[0.01] / 2


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
    figures = grpo.train(replace(start, out=str(tmp_path / "out"), optimisation=settings), Host())
    assert max(figures["clipped"]) > 0.2, "a ratio of e^0.5 is out of range wherever the advantage is positive"
    assert figures["kl"] == pytest.approx([0.0] * 4, abs=1e-3), "it has not moved from where it starts"


def test_dropout_is_not_taken_for_a_policy_that_has_moved(start: LearnerTask, tmp_path: Path) -> None:
    dropping = REASONER.model_copy(update={"lora": config.Lora(rank=8, upper_layers=1.0, dropout=0.5)})
    first = replace(start, out=str(tmp_path / "first"), reasoner=dropping, weights=None)
    settings = config.Sft(lr=3e-2, epochs=6, batch_sessions=8, neftune_alpha=0.0)
    moved = replace(first, optimisation=settings, data=str(Path(start.data).parent / "writer"))
    sft.train(moved, Host())
    learn = GRPO.model_copy(update={"epochs": 1, "lr": 1e-6, "kl_weight": 0.1})
    figures = grpo.train(replace(first, out=str(tmp_path / "out"), weights=moved.out, optimisation=learn), Host())
    assert max(figures["clipped"]) < 0.05
    assert figures["kl"] == pytest.approx([0.0] * 4, abs=1e-3)


def test_a_step_without_a_valid_query_has_no_reward_and_harms_nothing(start: LearnerTask, tmp_path: Path) -> None:
    """TRL gives None there."""
    settings = GRPO.model_copy(update={"epochs": 1})
    work = replace(start, out=str(tmp_path / "out"), optimisation=settings)
    steps = groups.plan(work)

    class EndsWithout(groups.OwnSource):
        def take(self, model: PreTrainedModel, step: int, places: Sequence[int]) -> list[groups.JudgedGroup]:
            found = super().take(model, step, places)
            if step + 1 < len(steps):
                return found
            return [replace(group, rewards=[math.nan] * len(group.rewards)) for group in found]

    figures = grpo.train(work, Host(), EndsWithout(work, steps))
    assert np.isfinite(figures["reward"]).tolist() == [True, True, True, False]
    assert figures["valid_rate"][-1] == 0
    assert np.isfinite(figures["loss"]).all()
    assert all(weight.isfinite().all() for weight in models.load_reasoner(REASONER, work.out).parameters())


def test_an_epochs_last_batch_is_filled_up_and_samples_anew(start: LearnerTask, tmp_path: Path) -> None:
    settings = GRPO.model_copy(update={"epochs": 1, "batch_sessions": 20})
    work = replace(start, out=str(tmp_path / "out"), optimisation=settings)
    figures = grpo.train(work, Host())
    assert figures["sessions"] == SESSIONS and figures["steps"] == 2


def test_no_more_sessions_are_sampled_and_judged_at_once_than_a_unit_has(
    start: LearnerTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = replace(start, rollout=start.rollout.model_copy(update={"unit_sessions": 3}))
    steps = groups.plan(work)
    source, policy = groups.OwnSource(work, steps), models.load_reasoner(REASONER, work.weights)
    sizes: list[int] = []
    embed = source.judge.encoder.embed
    monkeypatch.setattr(source.judge.encoder, "embed", lambda asked, ids: sizes.append(len(ids)) or embed(asked, ids))
    found = source.take(policy, 0, range(8))
    assert sizes == [3 * GRPO.n, 3 * GRPO.n, 2 * GRPO.n]
    whole = groups.OwnSource(start, steps).take(policy, 0, range(8))
    assert [group.completion_ids for group in found] == [group.completion_ids for group in whole]


def test_the_plan_has_every_session_once_an_epoch_and_fills_up_the_last_step() -> None:
    ids = [f"s{i}" for i in range(10)]
    steps = engine.in_steps(ids, GRPO.model_copy(update={"epochs": 3, "batch_sessions": 4}), seed=5)
    assert [len(step) for step in steps] == [4] * 9
    for epoch in range(3):
        own = [i for step in steps[epoch * 3 : epoch * 3 + 3] for i in step]
        assert sorted(own[:10]) == ids and own[10:] == own[:2]
    assert steps[:3] != steps[3:6] != steps[6:]
    assert steps == engine.in_steps(ids, GRPO.model_copy(update={"epochs": 3, "batch_sessions": 4}), seed=5)


def test_a_session_that_comes_again_is_sampled_anew() -> None:
    step = ["a", "b", "a", "a"]
    drawn = groups.seeds(step, 2, range(4), n=3, seed=1)
    assert len({seed for row in drawn for seed in row}) == 12
    assert groups.seeds(step, 2, [2], n=3, seed=1) == drawn[2:3], "whoever samples it, and with whom"
    assert not {seed for row in groups.seeds(step, 3, range(4), n=3, seed=1) for seed in row} & set(drawn[0])


def test_what_must_not_be_judged_counts_as_worse_than_its_group() -> None:
    nan, below = float("nan"), grpo.INVALID_BELOW
    rewards = torch.tensor([[-1.0, nan, -3.0], [nan, nan, nan], [-2.0, -2.0, -1.0], [0.0, 0.0, nan]])
    expected = torch.tensor([[-1.0, -3.0 - below, -3.0], [nan, nan, nan], [-2.0, -2.0, -1.0], [0.0, 0.0, -below]])
    torch.testing.assert_close(grpo.below_worst(rewards), expected, equal_nan=True)


def test_a_query_that_must_not_be_judged_has_no_reward(start: LearnerTask) -> None:
    judge = groups.Judge(start)
    assert start.pair is not None
    ids = judge.encoder._ids(f" {WORDS[0][:4]}\n")
    vector = np.zeros(judge.encoder.hidden_size, np.float16)
    samples = [
        Sample(query, completion, [0.0] * len(completion), finish, 0, vector)
        for query, completion, finish in (("", ids[-1:], "stop"), ("slow", ids[:-1], "length"), ("slow", ids, "stop"))
    ]
    (judged,) = judge.judge(["s001"], [Group([1], vector, samples)])
    assert np.isnan(judged.rewards).tolist() == [True, True, False]
    ranker, catalogue = scoring.load(start.pair.rankers[0]), Catalogue.load(start.pair.log)
    table = judge.rankers.table.take(pa.array([judge.sessions.row["s001"]]))
    arrays = examples(table, ranker.space, catalogue)
    labels = Labels.of(start.pair.reward, table, arrays, catalogue)
    read = judge.encoder.embed(judge.sessions.prompts(["s001"]), [ids])[None]
    expected = judge_queries(ranker, arrays, labels, read, start.pair.reward)[0]
    assert judged.rewards[2] == pytest.approx(expected[0, 0], rel=1e-4)
