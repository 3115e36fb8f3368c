"""Judging a round unit by unit; what a reward model says of one is tests/unit/test_reward_model.py's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from learner_data import SESSIONS
from test_loop_round_sessions import N, run_in, write_round

from rgalign_ray import config, storage
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.loop import judge_stages
from rgalign_ray.loop.stage import Outcome, Run
from rgalign_ray.reward import actor
from rgalign_ray.reward.gate import gate


class Rewards:
    """What `write_round` says in place of reward models, of which the first try loses one."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.dies_after = run, 0
        self.asked: list[str] = []
        self.models: list[int] = []
        monkeypatch.setattr(actor, "remote", lambda *arguments: object())
        monkeypatch.setattr(actor, "score_all", self.score_all)
        monkeypatch.setattr(judge_stages.ray, "kill", lambda model: None)

    def score_all(
        self, models: Sequence[Any], requests: Iterable[actor.Request]
    ) -> Iterator[tuple[actor.Request, pa.Table]]:
        self.models.append(len(models))
        for request in requests:
            name = storage.pure_path(request[1]).name
            if self.dies_after and len(self.asked) == self.dies_after:
                raise InfrastructureError("rewards: the reward model died.")
            self.asked.append(name)
            scored = storage.read_table(self.run.uri("rewards_1", judge_stages.SCORED, name))
            valid = pc.is_finite(scored["reward"])
            second = pc.add(
                scored["reward"], pc.divide(pc.cast(scored["sample"], pa.float32()), pa.scalar(2, pa.float32()))
            )
            audit = pc.negate(scored["reward"])
            for column, values in (("second", second), ("audit", audit), ("valid", valid)):
                place = scored.schema.get_field_index(column)
                scored = scored.set_column(place, scored.schema.field(place), values)
            yield request, scored


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rewards:
    run = run_in(tmp_path)
    write_round(run, [5, 8, 21])
    return Rewards(run, monkeypatch)


def judge(rewards: Rewards, out: Path, **reward: object) -> Outcome:
    settings = rewards.run.config.model_copy(update={"reward": config.Reward.model_validate(reward)})
    return judge_stages.judge(Run(settings), str(out), 1)


def test_another_try_judges_what_is_missing_alone(rewards: Rewards, tmp_path: Path) -> None:
    whole = judge(rewards, tmp_path / "whole")
    files, rewards.asked = rewards.asked, []
    assert len(files) == 8 and whole.rows["rollouts"] == SESSIONS * N > whole.rows["valid"] > 0
    foreign = storage.join(str(tmp_path / "again"), judge_stages.SCORED, "000000-foreign.parquet")
    storage.write_table(foreign, pa.table({"valid": [True]}))
    rewards.dies_after = 3
    with pytest.raises(InfrastructureError):
        judge(rewards, tmp_path / "again")
    rewards.dies_after = 0
    assert judge(rewards, tmp_path / "again") == whole
    assert rewards.asked == files, "none twice"
    assert judge(rewards, tmp_path / "again") == whole and rewards.asked == files, "nor a third time"


def test_no_more_models_are_started_than_there_are_units(rewards: Rewards, tmp_path: Path) -> None:
    judge(rewards, tmp_path / "out", workers=3)
    judge(rewards, tmp_path / "many", workers=30)
    assert rewards.models == [3, 8]


def test_a_round_of_any_length_is_told_of_by_so_many_queries(
    rewards: Rewards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judge(rewards, tmp_path / "whole").figures["gate"]["sessions"]
    monkeypatch.setattr(judge_stages, "GATE_ROLLOUTS", 3 * N)
    few = judge(rewards, tmp_path / "few").figures["gate"]["sessions"]
    assert 0 < few < whole


def test_the_gate_holds_the_reward_against_the_other_judge_and_the_auditor(rewards: Rewards, tmp_path: Path) -> None:
    settings = rewards.run.config
    shares = settings.roles.model_copy(update={"audit": 0.1, "test": settings.roles.test - 0.1})
    rewards.run = Run(settings.model_copy(update={"roles": shares}))
    found = judge(rewards, tmp_path / "out").figures["gate"]
    scored = storage.read_table(str(tmp_path / "out" / judge_stages.SCORED))
    scored = scored.sort_by([("session_id", "ascending"), ("sample", "ascending")])
    reward, second, audit = (scored[name].to_numpy().reshape(-1, N) for name in ("reward", "second", "audit"))
    users = [f"u{number:03d}" for number in range(SESSIONS)]
    expected = asdict(gate(np.stack([reward, second], axis=-1).astype(np.float64), users, audit.astype(np.float64)))
    for name, value in expected.items():
        if not name.endswith("by_session"):  # units lie in another order
            assert found[name] == pytest.approx(value), name
    assert found["reliability"] < 0.99 and found["audit"] == pytest.approx(-1.0)
