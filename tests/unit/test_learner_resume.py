"""A learner that goes on from a state, kept after any step, learns what it learns undisturbed: to the bit."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import ray.train
import torch
from learner_data import OBJECTIVES, Counts, task, write_choices, write_round, write_writer

from rgalign_ray import config
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import Host

STEPS = 4
CHANGES: dict[str, dict[str, Any]] = {"sft": {"neftune_alpha": 5.0}, "grpo": {"kl_weight": 0.1}}
"""What draws of chance, or looks back at the start."""
DROPS = ("sft", "contrastive")
"""Objectives that are tried with dropout: on a trainer of TRL's, and on our own loop."""


class Keeps(Counts):
    """Keeps every state."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def due(self) -> bool:
        return True

    def keep(self, folder: str, step: int) -> None:
        shutil.copytree(folder, self.folder / str(step))


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(config.AlignName))
def test_from_any_step(name: str, tmp_path: Path) -> None:
    write_round(tmp_path)
    write_choices(tmp_path)
    training.group_of_one()
    changes = {"batch_sessions": 16, "epochs": 2} | CHANGES.get(name, {})
    settings = OBJECTIVES[name].model_copy(update=changes)
    work = replace(task(tmp_path, tmp_path / "quiet", settings), objective=name)
    if name in DROPS:
        dropping = config.Lora(rank=8, upper_layers=1.0, dropout=0.3)
        work = replace(work, reasoner=work.reasoner.model_copy(update={"lora": dropping}))
    if name == "grpo":  # needs a reasoner that writes valid queries, and here moves all its weights
        whole = work.reasoner.model_copy(update={"lora": None})
        work = replace(work, reasoner=whole, **write_writer(tmp_path, whole))
    objective = importlib.import_module(f"rgalign_ray.learner.{name}")
    quiet = objective.train(work, Host())
    assert quiet["steps"] == STEPS and max(map(abs, quiet["loss"])) > 1e-4, "there is something to learn"
    objective.train(replace(work, out=str(tmp_path / "kept")), Keeps(tmp_path / "states"))
    assert {folder.name for folder in (tmp_path / "states").iterdir()} == {"1", "2", "3"}
    assert weights(tmp_path / "kept") == weights(tmp_path / "quiet"), "keeping changes nothing"
    for step in range(1, STEPS):
        host = Counts(str(tmp_path / f"states/{step}"))
        figures = objective.train(replace(work, out=str(tmp_path / f"from_{step}")), host)
        assert host.steps == STEPS - step, "no step is taken again"
        assert figures == quiet
        assert weights(tmp_path / f"from_{step}") == weights(tmp_path / "quiet")


def test_a_state_is_kept_once_ray_train_has_registered_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that an earlier state needs are there until then: `report` only puts a state in line."""
    training.group_of_one()
    registered: list[SimpleNamespace] = []
    asked: list[float] = []

    def now(mode: object, timeout_s: float) -> list[SimpleNamespace]:
        asked.append(timeout_s)
        return registered

    monkeypatch.setattr(ray.train, "report", lambda *reported, **more: None)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", now)
    host = training.TrainHost(None, 4, lambda steps: None, 0.0, torch.device("cpu"))
    assert host.kept == 4 and not asked, "what it goes on from is registered"
    host.keep(str(tmp_path), 5)
    assert host.kept == 4
    registered.append(SimpleNamespace(metrics={"step": 5}))
    assert host.kept == 5 and host.kept == 5
    assert asked == [0.0, 0.0], "it does not wait, and does not ask again"


def weights(folder: Path) -> bytes:
    [file] = folder.glob("*.safetensors")
    return file.read_bytes()
