"""What is told of a reward model that gives no answer; what it answers is tests/unit/test_reward_model.py's."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from rgalign_ray.errors import InfrastructureError
from rgalign_ray.reward import actor


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GetTimeoutError("late"), r"gave no answer for 9 s[^\n]*at:\nit has not started"),
        (RayActorError(), "died more often than it is started"),
    ],
)
def test_silence_and_deaths_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def get(call: Any, timeout: float) -> None:
        raise error

    monkeypatch.setattr(actor.ray, "get", get)
    with pytest.raises(InfrastructureError, match=f"rewards: the reward model {says}"):
        actor._result(object(), object(), 9.0)
