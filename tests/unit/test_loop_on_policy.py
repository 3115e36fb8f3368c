"""What the keeper of RG-GRPO's samplers takes for a death."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from learner_data import OBJECTIVES, task
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from rgalign_ray import config
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.loop.on_policy import Keeper, _Member


def test_a_sampler_that_the_memory_monitor_kills_has_died(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells of it by an error that is not the one of an actor's death."""

    class Stream:
        class lose:  # noqa: N801
            @staticmethod
            def remote(name: str) -> str:
                return name

    def get(call: str, timeout: float) -> None:
        if call == "call":
            raise OutOfMemoryError("the node is low on memory")
        lost.append(call)

    lost: list[str] = []
    started: list[str] = []
    monkeypatch.setattr(ray, "get", get)
    chosen = config.Config(rollout=config.Rollout(retries=1))
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    keeper = Keeper(task(tmp_path, tmp_path, OBJECTIVES["grpo"]), chosen, [], Stream, None, "")
    monkeypatch.setattr(keeper, "_start", started.append)
    keeper._at_work["call"] = _Member("sampler-0", None, None)
    keeper._ended("call")
    assert (lost, started) == (["sampler-0"], ["sampler-0'"])
    keeper._at_work["call"] = _Member("sampler-0'", None, None)
    sentence = r"sampler sampler-0' died \(the node is low on memory\); death 2, with rollout\.retries = 1\."
    with pytest.raises(InfrastructureError, match=sentence):
        keeper._ended("call")


@pytest.mark.parametrize("error", [ActorDiedError(), OutOfMemoryError("the node is low on memory")], ids=repr)
def test_the_death_of_the_judge_is_not_that_of_the_sampler_who_asked_it(
    error: Exception, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(call: str, timeout: float) -> None:
        raise RayTaskError("work", "", error).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    keeper = Keeper(task(tmp_path, tmp_path, OBJECTIVES["grpo"]), config.Config(), [], None, None, "")
    keeper._at_work["call"] = _Member("sampler-0", None, None)
    with pytest.raises(InfrastructureError, match=r"^RG-GRPO: the judge, or the stream of groups, died for good \("):
        keeper._ended("call")
    assert keeper.deaths == 0
