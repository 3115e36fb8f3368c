"""Our contender: DIN trained by `ranker.fit.Fit` in one process, as `ranker.training` does in its local mode.

    python -m benchmarks.din_rgalign train FOLDER SEED OUT [pointwise]
    python -m benchmarks.din_rgalign gauc ROWS.npz OUT

`ranker_vs_fuxictr` writes FOLDER and reads OUT.
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
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from rgalign_ray import config, storage
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import column_names, columns
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.metrics import gauc as gauc_of
from rgalign_ray.ranker.batches import score_rows
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.rows import Rows, from_tables, training_table
from rgalign_ray.ranker.sizes import Sizes


class Timed(Fit):
    """Training that notes how long each epoch takes, and how long each evaluation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.epochs: list[list[float]] = []
        self.evaluations: list[float] = []

    def _epoch(self, epoch: int) -> float:
        started = _clocks()
        loss = super()._epoch(epoch)
        self.epochs.append((_clocks() - started).tolist())
        return loss

    def validation_gauc(self, readout: str) -> float:
        started = _clocks()
        value = super().validation_gauc(readout)
        self.evaluations.append(float((_clocks() - started)[0]))
        return value


class Pointwise(Timed):
    """FuxiCTR's objective: binary cross entropy over all pairs, and scores that start from zero."""

    def _statistics(self, items: np.ndarray | None) -> None:
        super()._statistics(items)
        self.model.prior.zero_()

    def _with_a_part(self, rows: Rows) -> Rows:
        return rows  # it reads every pair

    def _loss(
        self, batch: dict[str, Tensor], embedding: Tensor | None, is_null: Tensor, at: tuple[int, int], number: int
    ) -> Tensor:
        candidates = batch["candidates"]
        scores = self.model.score(self.model.users(batch), self.model.items(), candidates)
        mask = candidates >= 0
        losses = F.binary_cross_entropy_with_logits(scores, batch["clicks"].float(), reduction="none")
        return (losses * mask).sum() / mask.sum() * len(scores)


def train(folder: Path, seed: int, out: Path, pointwise: bool) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    log, space = settings["log"], FeatureSpace.from_dict(storage.read_json(settings["space"]))
    catalogue = Catalogue.load(log)
    sizes = Sizes.of(space, num_intents=catalogue.size, embedding_dim=0, item_dim=0)
    ranker = config.Ranker.model_validate(settings["ranker"])
    contender = Pointwise if pointwise else Timed
    fit = contender("din", sizes, ranker, rows_of(log, space, sizes, ["rank", "valid"]), None, seed, Group())
    figures = fit.run()
    test = rows_of(log, space, sizes, ["test"])
    np.save(out.with_suffix(".npy"), score_rows(fit.model, test, "null"))
    result = {
        "samples": settings["pairs"]["train"],
        "samples_read": len(fit.train["candidates"].values),  # the others no loss reads
        "epochs": fit.epochs,
        "evaluation_seconds": fit.evaluations,
        "parameters": figures["parameters"],
        "valid_gauc": figures["best_gauc"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    out.write_text(json.dumps(result))


def gauc(rows: Path, out: Path, repetitions: int = 21) -> None:
    """Times our GAUC of given scores."""
    arrays = np.load(rows)
    clocks, value = [], 0.0
    for _ in range(repetitions):
        started = _clocks()
        value = gauc_of(arrays["scores"], arrays["labels"], arrays["groups"])
        clocks.append((_clocks() - started).tolist())
    median = [statistics.median(column) for column in zip(*clocks, strict=True)]
    out.write_text(json.dumps({"gauc": value, "seconds": median, "all": clocks}))


def rows_of(log: str, space: FeatureSpace, sizes: Sizes, roles: list[str]) -> Rows:
    """The sessions of these roles, in the order of the log, as a ranker reads them."""
    names = [*columns(space, column_names(log)), "role"]
    table = storage.read_table(storage.join(log, "sessions"), names, pc.field("role").isin(roles))
    sets = storage.join(log, "candidate_sets.parquet")
    tables = (
        storage.read_table(storage.join(log, "intents.parquet")),
        storage.read_table(sets) if storage.exists(sets) else None,
    )
    return from_tables([training_table(table, space.to_dict(), tables, None, None, "valid")], sizes)


def _clocks() -> np.ndarray:
    """Wall seconds and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), "pointwise" in sys.argv[5:])
    else:
        gauc(Path(sys.argv[2]), Path(sys.argv[3]))
