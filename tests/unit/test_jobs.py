"""Every job is a verb of the command line, and each verb of a loop ends where it says."""

from __future__ import annotations

import runpy
import sys

import pytest

import jobs
from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import controller
from rgalign_ray.loop.stages import stages

ENDS = {
    "prepare": "features",
    "train_ranker": "rankers_0",
    "rollout": "rollouts_1",
    "align": "align_1_gradient",
    "evaluate": "evaluation",
}


@pytest.mark.parametrize("name", [*ENDS, "loop", "compare", "serve"])
@pytest.mark.parametrize("address", [None, "10.0.0.5:6379"])
def test_a_job_passes_its_arguments_to_its_verb(
    name: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(sys, "argv", ["job", "--config", "smoke"])
    monkeypatch.setattr(jobs, "main", lambda: None)
    runpy.run_module(f"jobs.{name}", run_name="__main__")
    joined = ["--set", "cluster.address=auto"] if address else []
    until = ["--until", *sys.argv[3:4]] if name in ENDS else []
    assert sys.argv[1:] == [name if name in ("compare", "serve") else "loop", *until, *joined, "--config", "smoke"]
    if until:
        sequence = stages(config.load("smoke"))
        assert sequence[controller.stages_through(sequence, until[1]) - 1].name == ENDS[name]


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--until rollouts_3: no such stage; there are log, sessions, features"):
        controller.run(config.load("smoke"), until="rollouts_3")
