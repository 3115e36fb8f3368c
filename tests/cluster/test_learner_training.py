"""RG-SFT as a DeepSpeed engine in two Ray Train workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from rgalign_ray import config, schema, storage
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.reasoner import models

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=4, upper_layers=1.0))


def test_two_workers_learn_and_export_one_adapter(ray_cluster: object, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {
            "session_id": f"s{i}",
            "prompt_ids": draw.integers(3, 250, 20).tolist(),
            "completion_ids": [50, 51, 52, 2],
            "query": "q",
            "weight": 1.0,
            "rank": 0,
        }
        for i in range(30)
    ]
    storage.write_table(str(tmp_path / "data/selected/0.parquet"), pa.Table.from_pylist(rows, schema=schema.SELECTED))
    task = LearnerTask(
        objective="sft",
        reasoner=REASONER,
        learner=config.Learner(workers=2, micro_batch=2, zero_stage=2),
        optimisation=config.Sft(lr=2e-2, epochs=3, batch_sessions=8),
        weights=None,
        data=str(tmp_path / "data"),
        pair=None,
        prompt=config.Prompt(),
        rollout=config.Rollout(),
        out=str(tmp_path / "out"),
        version="tiny+1.sft",
        seed=0,
    )
    figures = training.fit(task, 12, str(tmp_path / "train"), "sft")
    assert figures["steps"] == 12
    assert not storage.exists(str(tmp_path / "train/sft"))
    assert figures["loss"][-1] < figures["loss"][0] - 0.5
    assert models.version_of(REASONER, task.out) == "tiny+1.sft"
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert models.load_reasoner(REASONER, task.out).config.vocab_size == 259
