"""RG-GRPO's stream with samplers and learners that only wait: what staleness buys, beside an ideal pipeline.

    python -m benchmarks.overlap --out runs/overlap

In an ideal run a step takes sampling + learning where it is sampled with the weights of the step before (staleness 0),
and the longer of both where it may lag by one. What is missing went into admitting,
handing out and taking groups. Weights are a name; what they cost is in `benchmarks.weight_swap`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress
from rgalign_ray.learner.groups import JudgedGroup
from rgalign_ray.loop import environment
from rgalign_ray.reasoner.engine import Group

SESSIONS, N = 16, 8
"""Of a step, and queries of a session."""
SAMPLERS = 2
DEADLINE_S = 120.0


class WaitingSampler:
    """Stands in the place of `Sampler`: sleeps `seconds` a task."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def take(self, weights: str | None) -> None:
        """Takes no time."""

    def sample(self, step: int, places: tuple[int, ...]) -> list[JudgedGroup]:
        time.sleep(self.seconds)
        return [JudgedGroup([1] * 200, [[1] * 32] * N, [[-1.0] * 32] * N, [0.0] * N) for _ in places]


class IdleJudge:
    def judge(self, session_ids: tuple[str, ...], groups: list[Group]) -> list[Group]:
        return groups


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 12,
    sample_s: Annotated[float, typer.Option(help="What samplers take for a step.")] = 2.0,
    learn_s: Annotated[float, typer.Option(help="What learners take for a step.")] = 2.0,
) -> None:
    """Measure staleness 0 and 1."""
    environment.prepare(config.load("demo"))  # Ray reads it as it is imported
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, logging_level="error"
    )
    found = []
    with progress.track("overlap", 2 * steps, "steps") as advance:
        for staleness in (0, 1):
            seconds = one(steps, staleness, sample_s, learn_s, advance)
            found.append(
                {"staleness": staleness, "seconds": seconds, "ideal": ideal(steps, staleness, sample_s, learn_s)}
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / "overlap.json").write_text(json.dumps({"steps": steps, "found": found}, indent=2))
    _show(found, steps, sample_s, learn_s)
    print(out / "overlap.json")
    ray.shutdown()


def ideal(steps: int, staleness: int, sample_s: float, learn_s: float) -> float:
    """Seconds of a pipeline in which nothing but sampling and learning takes time."""
    return learn_s + (steps - 1) * (max(sample_s, learn_s) if staleness else sample_s + learn_s)


def one(steps: int, staleness: int, sample_s: float, learn_s: float, advance: progress.Advance) -> float:
    """Seconds from the first step's groups being there, when all processes have imported what they need, to the last
    step's having been learned.
    """
    import ray

    from rgalign_ray.loop.on_policy import SamplerActor
    from rgalign_ray.rollout.on_policy import OnPolicyStream

    class WaitingSamplerActor(SamplerActor):
        def __init__(self) -> None:
            self.sampler = WaitingSampler(sample_s)  # type: ignore[assignment]
            self.patience = DEADLINE_S

    plan = [[f"s{place}" for place in range(SESSIONS)] for _ in range(steps)]
    unit = SESSIONS // SAMPLERS
    stream = ray.remote(OnPolicyStream).options(num_cpus=0).remote(plan, staleness, unit, DEADLINE_S)
    judge = ray.remote(IdleJudge).options(num_cpus=0).remote()
    actor = ray.remote(WaitingSamplerActor).options(num_cpus=0)
    samplers: list[Any] = [actor.remote() for _ in range(SAMPLERS)]
    ray.get([each.__ray_ready__.remote() for each in (stream, judge, *samplers)], timeout=DEADLINE_S)
    for number, sampler in enumerate(samplers):
        sampler.work.remote(f"sampler-{number}", stream, judge)
    began = 0.0
    for step in range(steps):
        if step:
            ray.get(stream.publish.remote(step, f"weights {step}", step), timeout=DEADLINE_S)
        ray.get(stream.take.remote(step, range(SESSIONS)), timeout=DEADLINE_S)
        began = began or time.monotonic()
        time.sleep(learn_s)
        advance(1)
    seconds = time.monotonic() - began
    for each in (stream, judge, *samplers):
        ray.kill(each)
    return seconds


def _show(found: list[dict[str, float]], steps: int, sample_s: float, learn_s: float) -> None:
    table = Table(title=f"{steps} steps of {sample_s:g} s sampling and {learn_s:g} s learning")
    for column in ("staleness", "seconds", "ideal", "share of the ideal pipeline"):
        table.add_column(column, justify="right")
    for row in found:
        share = row["ideal"] / row["seconds"]
        table.add_row(f"{row['staleness']:.0f}", f"{row['seconds']:.1f}", f"{row['ideal']:.1f}", f"{share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    command.run(measure)
