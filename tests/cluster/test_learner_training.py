"""RG-SFT as a DeepSpeed engine in two Ray Train workers, whoever dies on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kills import kept_twice, kill, when
from learner_job import FIGURES, REASONER, STEPS, TRAIN, task

from rgalign_ray import storage
from rgalign_ray.learner import training
from rgalign_ray.reasoner import models


@pytest.fixture(scope="module")
def quiet(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, bytes]:
    """Figures and weights of a run that nothing disturbs, and that keeps no state."""
    folder = tmp_path_factory.mktemp("quiet")
    work = task(folder)
    figures = training.fit(work, STEPS, str(folder / TRAIN), "sft", checkpoint_every_s=1e9)
    assert not storage.exists(str(folder / TRAIN / "sft"))
    assert models.version_of(REASONER, work.out) == "tiny+1.sft"
    assert models.load_reasoner(REASONER, work.out).config.vocab_size == 259
    return figures, (folder / "out/adapter_model.safetensors").read_bytes()


def test_two_workers_learn_and_export_one_adapter(quiet: tuple[dict, bytes]) -> None:
    figures, _ = quiet
    assert figures["steps"] == STEPS
    assert figures["loss"][-1] < figures["loss"][0] - 0.5


@pytest.mark.fault
@pytest.mark.slow
def test_a_rank_that_is_killed_costs_nothing_that_is_learned(quiet: tuple[dict, bytes], tmp_path: Path) -> None:
    killed: list[int] = []
    killer = when(kept_twice(tmp_path / TRAIN / "sft"), lambda: killed.append(kill("RayTrainWorker")))
    figures = training.fit(task(tmp_path), STEPS, str(tmp_path / TRAIN), "sft", checkpoint_every_s=0.0)
    killer.join()
    assert len(killed) == 1
    assert (figures, (tmp_path / "out/adapter_model.safetensors").read_bytes()) == quiet


@pytest.mark.fault
@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_by_the_same_call(quiet: tuple[dict, bytes], tmp_path: Path) -> None:
    first = start(tmp_path)
    when(kept_twice(tmp_path / TRAIN / "sft"), first.kill)
    first.communicate(timeout=400)
    assert first.returncode == -signal.SIGKILL and not (tmp_path / FIGURES).exists()
    second = start(tmp_path)
    _, told = second.communicate(timeout=400)
    assert second.returncode == 0, told[-3000:]
    assert "RG-sft goes on from step " in told
    figures = storage.read_json(str(tmp_path / FIGURES))
    assert (figures, (tmp_path / "out/adapter_model.safetensors").read_bytes()) == quiet


def start(folder: Path) -> subprocess.Popen[str]:
    job = str(Path(__file__).with_name("learner_job.py"))
    return subprocess.Popen(
        [sys.executable, job, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
