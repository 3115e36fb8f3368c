"""How many workers hold a batch, and what each keeps of the model, does not matter: for every objective the result is
the same, also where the last batch is not full.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from learner_data import OBJECTIVES, REASONER, task, write_choices, write_round, write_writer

from rgalign_ray import config, storage
from rgalign_ray.learner import token_rows, training
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.ops.local_cluster import free_port
from rgalign_ray.reasoner import models


def work(rank: int, tasks: list[LearnerTask], port: int) -> None:
    """One of `tasks[0].learner.workers` workers, at every task in turn."""
    torch.set_num_threads(1)
    workers = tasks[0].learner.workers
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group("gloo")
    token_rows.pays = lambda *sizes: True  # prompts are too short for it here
    for each in tasks:
        figures = importlib.import_module(f"rgalign_ray.learner.{each.objective}").train(each, Host())
        if rank == 0:
            storage.write_json(f"{each.out}/figures.json", figures)
    dist.destroy_process_group()


WHOLE = REASONER.model_copy(update={"lora": None})
CASES = {name: (name, settings, REASONER) for name, settings in OBJECTIVES.items()} | {
    "grpo": ("grpo", OBJECTIVES["grpo"], WHOLE),  # as wrote what it begins with
    "dpo of all weights": ("dpo", OBJECTIVES["dpo"], WHOLE),
    "contrastive of all weights": ("contrastive", OBJECTIVES["contrastive"], WHOLE),
    "latent of all weights": ("latent", OBJECTIVES["latent"], WHOLE),
    "gradient with its text": ("gradient", OBJECTIVES["gradient"].model_copy(update={"text_weight": 0.5}), REASONER),
}
"""Objectives, what they learn with, and of which weights."""
LAYOUTS = {"alone": (1, 2), "two": (2, 2), "sharded": (2, 3), "optimiser sharded": (2, 1)}
"""Workers and ZeRO stage."""


@pytest.mark.slow
def test_one_worker_and_two_give_the_same_result(tmp_path: Path) -> None:
    assert set(OBJECTIVES) == set(get_args(config.AlignName))
    write_round(tmp_path, count=33)
    write_choices(tmp_path)
    training.group_of_one()  # this process learns to write, before it has others learn
    writer = write_writer(tmp_path, WHOLE)
    for layout, (workers, zero_stage) in LAYOUTS.items():
        learner = config.Learner(workers=workers, micro_batch=4, zero_stage=zero_stage)
        tasks = [
            replace(
                task(tmp_path, tmp_path / f"{name}-{layout}", settings, learner=learner, reasoner=reasoner),
                objective=objective,
                **(writer if objective == "grpo" else {}),  # else it samples nothing that could be judged
            )
            for name, (objective, settings, reasoner) in CASES.items()
        ]
        mp.spawn(work, (tasks, free_port()), nprocs=workers)
    for name, (_, _, reasoner) in CASES.items():
        alone = models.load_reasoner(reasoner, str(tmp_path / f"{name}-alone"))
        losses = storage.read_json(str(tmp_path / f"{name}-alone/figures.json"))["loss"]
        assert max(map(abs, losses)) > 1e-3, f"{name} has something to learn"
        for layout in list(LAYOUTS)[1:]:
            place = f"{name}-{layout}"
            assert storage.read_json(str(tmp_path / place / "figures.json"))["loss"] == pytest.approx(
                losses, rel=1e-3, abs=1e-5
            ), place
            other = models.load_reasoner(reasoner, str(tmp_path / place))
            for parameter, weight in alone.named_parameters():
                torch.testing.assert_close(other.get_parameter(parameter), weight, rtol=1e-3, atol=1e-4)
