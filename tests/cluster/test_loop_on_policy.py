"""RG-GRPO over actors learns what it learns in one process, whoever dies on the way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import kill, when
from learner_data import task, write_round, write_writer

from rgalign_ray import config
from rgalign_ray.learner import grpo, training
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.loop import on_policy
from rgalign_ray.reasoner import models

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=None)
SETTINGS = config.Grpo(lr=3e-3, epochs=2, batch_sessions=8, n=4, temperature=1.0, sampler="pool")


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training.group_of_one()
    torch.set_num_threads(1)


SMALL = {"workers": 2, "cpus_per_worker": 0.25, "unit_sessions": 2, "max_new_tokens": 8, "deadline_s": 120.0}


def work(folder: Path, name: str, **changes: object) -> tuple[LearnerTask, config.Config]:
    settings = config.load("smoke").model_copy(update={"rollout": config.Rollout.model_validate(SMALL)})
    made = task(folder, folder / name, SETTINGS.model_copy(update=changes), reasoner=REASONER)
    learner = config.Learner(workers=1, micro_batch=4, cpus_per_worker=0.5)
    start = {"weights": str(folder / "writer/out"), "rollout": settings.rollout}
    return replace(made, objective="grpo", learner=learner, **start), settings


def run(folder: Path, name: str, **changes: object) -> dict:
    job, settings = work(folder, name, **changes)
    return on_policy.fit(job, settings, 8, str(folder / "records"), name, checkpoint_every_s=0.0)


def test_over_actors_as_in_one_process(tmp_path: Path) -> None:
    write_round(tmp_path)
    write_writer(tmp_path, REASONER)
    job, _ = work(tmp_path, "alone")
    alone = grpo.train(job, Host())
    assert min(alone["valid_rate"]) > 0.5 and max(map(abs, alone["loss"])) > 1e-4, "there is something to learn"
    pool = run(tmp_path, "pool")
    assert pool.pop("sampler_deaths") == 0
    assert pool.keys() == alone.keys()
    for name, curve in alone.items():
        np.testing.assert_allclose(np.array(pool[name], float), np.array(curve, float), rtol=1e-4, atol=1e-6)
    assert not list((tmp_path / "records").iterdir()), "weights and states on the way are gone when all is learned"
    one, other = (models.load_reasoner(REASONER, str(tmp_path / name)) for name in ("alone", "pool"))
    for name, value in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.fault
def test_a_step_ahead_and_whoever_is_killed_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    write_round(tmp_path)
    write_writer(tmp_path, REASONER)
    quiet = run(tmp_path, "quiet", staleness=1, clip=1e-4)
    weights = tmp_path / "records/killed.weights"
    victims = {2: "SamplerActor", 3: "Judge", 5: "RayTrainWorker"}
    killed: dict[str, int] = {}

    def end(victim: str) -> None:
        killed[victim] = kill(victim)

    killers = [when((weights / f"{step:06d}").exists, partial(end, victim)) for step, victim in victims.items()]
    found = run(tmp_path, "killed", staleness=1, clip=1e-4)
    for killer in killers:
        killer.join(timeout=10)
    assert killed.keys() == set(victims.values()), "all were there to be killed"
    assert (quiet.pop("sampler_deaths"), found.pop("sampler_deaths")) == (0, 1)
    for name, curve in quiet.items():
        np.testing.assert_array_equal(np.array(found[name], float), np.array(curve, float))
    assert max(quiet["clipped"]) > 0, "samples of the step before are not taken for the policy's own"
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("quiet", "killed"))
    assert one == other
