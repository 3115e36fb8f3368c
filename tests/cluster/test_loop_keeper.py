"""Samplers of RG-GRPO that raise, hang or have no learners: the run goes on or ends with their sentence."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ray
from kills import alive
from learner_data import task
from ray import cloudpickle

from rgalign_ray import config
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.loop import on_policy
from rgalign_ray.rollout.on_policy import OnPolicyStream

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
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


class FakeSampler:
    """Says where it is from, by what a file says: hangs in its first task, in all, or fails in the second."""

    def __init__(self, trouble: Path) -> None:
        self.trouble = trouble

    def take(self, weights: str | None) -> None:
        pass

    def sample(self, step: int, places: tuple[int, ...]) -> list[str]:
        trouble = self.trouble.read_text()
        if trouble == "hang once" and places == (0,):
            self.trouble.write_text("")
            self.is_stuck()
        if trouble == "hang, fail":
            self.is_stuck() if places == (0,) else self.fails()
        return [f"group {step}/{place}" for place in places]

    def is_stuck(self) -> None:
        time.sleep(600)

    def fails(self) -> NoReturn:
        raise ZeroDivisionError("a bug")


class Samples(on_policy.SamplerActor):
    """Has a fake sampler."""

    def __init__(self, task: LearnerTask, steps: list[list[str]]) -> None:
        self.sampler = FakeSampler(Path(task.out))  # type: ignore[assignment]
        self.patience = task.rollout.deadline_s


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A keeper, its stream and the file of its trouble, around a judge; from what the trouble is, and settings."""
    actors: list[Any] = []
    monkeypatch.setattr(on_policy, "SamplerActor", Samples)

    def make(trouble: str, **changes: Any) -> tuple[on_policy.Keeper, Any]:
        job, chosen = work(tmp_path, **changes)
        Path(job.out).write_text(trouble)
        stream = ray.remote(OnPolicyStream).options(num_cpus=0).remote(PLAN, 0, 1)
        judge = ray.remote(FakeJudge).options(num_cpus=0).remote(job, False)
        actors.extend((stream, judge))
        ray.get([judge.judge.remote([], []), stream.silent.remote(0.0)], timeout=120)  # both have started
        return on_policy.Keeper(job, chosen, PLAN, stream, judge, str(tmp_path / "stacks")), stream

    yield make
    for actor in actors:
        ray.kill(actor)


def soon(so: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not so() and time.monotonic() < until:
        time.sleep(0.1)
    return so()


@pytest.mark.fault
def test_a_sampler_that_hangs_is_replaced_and_what_it_was_at_is_told(
    made: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper, stream = made("hang once", deadline_s=5.0)
    with keeper:
        groups = ray.get(stream.take.remote(0, [0, 1]), timeout=120)
    assert groups == ["group 0/0 judged", "group 0/1 judged"]
    assert (keeper.deaths, keeper.failure) == (1, None)
    [stacks] = (tmp_path / "stacks").iterdir()
    assert "in is_stuck" in stacks.read_text()
    sentence = f"sampler {stacks.stem} gave no answer for 5 s; what it was at stands in {stacks}"
    assert sentence in capfd.readouterr().err


@pytest.mark.fault
def test_samplers_that_hang_too_often_end_with_a_sentence(made: Callable[..., Any]) -> None:
    keeper, _ = made("hang once", deadline_s=2.0, retries=0)
    with keeper:
        assert soon(lambda: keeper.failure is not None)
    sentence = r"sampler sampler-\d gave no answer for 2 s; .*; death 1, with rollout\.retries = 0\."
    with pytest.raises(InfrastructureError, match=sentence):
        keeper.check()


def test_no_sampler_is_left_when_one_has_failed(made: Callable[..., Any]) -> None:
    keeper, _ = made("hang, fail", deadline_s=600.0)
    with keeper:
        assert soon(lambda: isinstance(keeper.failure, ZeroDivisionError))
        assert soon(lambda: not alive("Samples")), "neither the one that failed nor the one that hangs"


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
