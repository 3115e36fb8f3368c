"""A run of learners as a driver of its own, which test_learner_training.py kills."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from rgalign_ray import config, schema, storage
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import connection

REASONER = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=4, upper_layers=1.0))
STEPS = 12
TRAIN, FIGURES = "train", "figures.json"


def task(folder: Path) -> LearnerTask:
    """RG-SFT on thirty sessions, into `folder`/out."""
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
    storage.write_table(str(folder / "data/selected/0.parquet"), pa.Table.from_pylist(rows, schema=schema.SELECTED))
    return LearnerTask(
        objective="sft",
        reasoner=REASONER,
        learner=config.Learner(workers=2, micro_batch=2, zero_stage=2),
        optimisation=config.Sft(lr=2e-2, epochs=3, batch_sessions=8),
        weights=None,
        data=str(folder / "data"),
        pair=None,
        prompt=config.Prompt(),
        template=Template.load("shop"),
        rollout=config.Rollout(),
        out=str(folder / "out"),
        version="tiny+1.sft",
        seed=0,
    )


def main(folder: Path) -> None:
    connection.connect(config.Config(cluster=config.Cluster(num_cpus=2, object_store_mb=256)))
    from rgalign_ray.learner import training

    figures = training.fit(task(folder), STEPS, str(folder / TRAIN), "sft", checkpoint_every_s=0.0)
    storage.write_json(str(folder / FIGURES), figures)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
