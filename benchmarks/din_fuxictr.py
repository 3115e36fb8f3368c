"""FuxiCTR's contender: the DIN and the data loader of its wheel, run by its own `fit`, in its own environment.

    <environment of FuxiCTR>/bin/python benchmarks/din_fuxictr.py train FOLDER SEED OUT
    <environment of FuxiCTR>/bin/python benchmarks/din_fuxictr.py gauc ROWS.npz OUT

`ranker_vs_fuxictr` writes FOLDER and reads OUT. This file imports nothing of rgalign_ray, which is not installed there.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.metrics import evaluate_metrics
from fuxictr.pytorch.torch_utils import seed_everything
from model_zoo.LongCTR.DIN.DIN import DIN
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader


class Timed(DIN):
    """DIN that notes how long each epoch trains, its evaluation left out, and each step without the loader."""

    def train_epoch(self, data_generator: LongCTRDataLoader) -> None:
        self.away = np.zeros(2)
        started = _clocks()
        super().train_epoch(data_generator)
        self.epochs.append((_clocks() - started - self.away).tolist())

    def eval_step(self) -> None:
        started = _clocks()
        super().eval_step()
        self.away += _clocks() - started
        self.evaluations.append(float((_clocks() - started)[0]))

    def train_step(self, batch_data: Any) -> torch.Tensor:
        started = _clocks()
        loss = super().train_step(batch_data)
        self.steps[-1] += _clocks() - started
        return loss


def train(folder: Path, seed: int, out: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    seed_everything(seed)
    feature_map = FeatureMap(folder.name, str(folder))
    feature_map.load(str(folder / "feature_map.json"), {"group_id": "session", "embedding_dim": settings["dim"]})
    model = Timed(
        feature_map,
        dnn_hidden_units=settings["hidden"],
        attention_hidden_units=[settings["dim"]],
        attention_hidden_activations=["PReLU"],
        embedding_dim=settings["dim"],
        net_dropout=settings["dropout"],
        learning_rate=settings["lr"],
        optimizer="AdamW",
        loss="binary_crossentropy",
        metrics=["gAUC"],
        monitor="gAUC",
        early_stop_patience=settings["patience"],
        reduce_lr_on_plateau=False,
        verbose=0,
        model_root=str(out.parent),
    )
    for group in model.optimizer.param_groups:
        group["weight_decay"] = settings["weight_decay"]
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    model.epochs, model.evaluations, model.steps = [], [], [np.zeros(2)]
    parts = {name: _loader(feature_map, folder, name, settings) for name in ("train", "valid", "test")}
    model.fit(parts["train"], epochs=settings["epochs"], validation_data=parts["valid"])
    np.save(out.with_suffix(".npy"), model.predict(parts["test"]))
    result = {
        "samples": parts["train"].num_samples,
        "epochs": model.epochs,
        "step_seconds": (model.steps[0] / len(model.epochs)).tolist(),
        "evaluation_seconds": model.evaluations,
        "parameters": sum(p.numel() for p in model.parameters()),
        "valid_gauc": float(model._best_metric),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    out.write_text(json.dumps(result))


def gauc(rows: Path, out: Path, repetitions: int = 3) -> None:
    """Times FuxiCTR's gAUC of given scores."""
    arrays = np.load(rows)
    clocks, value = [], 0.0
    for _ in range(repetitions):
        started = _clocks()
        value = evaluate_metrics(arrays["labels"], arrays["scores"], ["gAUC"], arrays["groups"])["gAUC"]
        clocks.append((_clocks() - started).tolist())
    median = [statistics.median(column) for column in zip(*clocks, strict=True)]
    out.write_text(json.dumps({"gauc": float(value), "seconds": median, "all": clocks}))


def _loader(feature_map: FeatureMap, folder: Path, name: str, settings: dict[str, Any]) -> LongCTRDataLoader:
    """Loads in the process that trains, so that both contenders have one thread."""
    return LongCTRDataLoader(
        feature_map,
        str(folder / f"{name}.parquet"),
        user_info=str(folder / "user_info.parquet"),
        item_info=str(folder / "item_info.parquet"),
        batch_size=settings["batch_samples"],
        shuffle=name == "train",
        num_workers=0,
        max_len=settings["history_length"],
    )


def _clocks() -> np.ndarray:
    """Wall seconds, and CPU seconds of this process and of its children that have ended."""
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime
    return np.array([time.perf_counter(), cpu])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        gauc(Path(sys.argv[2]), Path(sys.argv[3]))
