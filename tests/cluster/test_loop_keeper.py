"""Samplers of RG-GRPO that raise, hang or have no learners: the run goes on or ends with their sentence."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from learner_data import task
from ray import cloudpickle

from rgalign_ray import config
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.loop import on_policy

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

PLAN = [["s0", "s1"]]


def work(folder: Path, **changes: Any) -> tuple[LearnerTask, config.Config]:
    rollout = config.Rollout(workers=2, cpus_per_worker=0.25, unit_sessions=1, **changes)
    chosen = config.load("smoke").model_copy(update={"rollout": rollout})
    made = task(folder, folder / "out", config.Grpo(sampler="pool"), rollout=rollout)
    return made, chosen


class FakeJudge:
    """Instead of the frozen pair."""

    def __init__(self, task: LearnerTask, on_gpu: bool) -> None:
        pass

    def judge(self, session_ids: list[str], groups: list[str]) -> list[str]:
        return [f"{group} judged" for group in groups]


class Raises(on_policy.SamplerActor):
    """Has a sampler that fails at once."""

    def __init__(self, task: LearnerTask, steps: list[list[str]]) -> None:
        pass

    def work(self, name: str, stream: Any, judge: Any) -> NoReturn:
        raise InfrastructureError(f"{name} has nothing to sample with.")


def test_samplers_that_fail_end_the_run_while_learners_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(*arguments: Any) -> None:
        while_waiting: Callable[[], None] = arguments[-1]
        until = time.monotonic() + 120
        while time.monotonic() < until:
            while_waiting()
            time.sleep(0.1)

    for module, name, fake in (
        (on_policy, "SamplerActor", Raises),
        (on_policy, "Judge", FakeJudge),
        (on_policy, "plan_of", lambda task: PLAN),
        (on_policy, "training", SimpleNamespace(fit=waits)),
    ):
        monkeypatch.setattr(module, name, fake)
    job, chosen = work(tmp_path)
    with pytest.raises(InfrastructureError, match=r"sampler-\d has nothing to sample with\."):
        on_policy.fit(job, chosen, 1, str(tmp_path), "waits", training.CHECKPOINT_EVERY_S)
