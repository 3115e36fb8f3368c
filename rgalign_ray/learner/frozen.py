"""The frozen ranker as learners read it, over the sessions of a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgalign_ray import storage
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.base import Batch
from rgalign_ray.ranker.fit import take, to_batch
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reward import functions

READ = ("fields", "multi", "history", "candidates")
"""What scores read of a session."""


def ranker(task: LearnerTask) -> QERec:
    """The ranker of the task's frozen pair, where its learner computes."""
    return _placed(_load(task), task)


def _load(task: LearnerTask) -> scoring.LoadedRanker:
    assert task.pair is not None
    return scoring.load(task.pair.ranker)


def _placed(loaded: scoring.LoadedRanker, task: LearnerTask) -> QERec:
    assert isinstance(loaded.model, QERec)
    return loaded.model.to(task.device)


class FrozenRanker:
    """Scores and rewards of query vectors; rows are places in the round's sessions, sorted by id.

    Raises:
        DataError: where the ranker is of another knowledge base.
    """

    def __init__(self, task: LearnerTask) -> None:
        assert task.pair is not None
        loaded = _load(task)
        catalogue = Catalogue.load(task.pair.log)
        loaded.require(intent_ids=catalogue.ids)
        self.table = storage.read_table(task.pair.sessions).sort_by("session_id")
        arrays = examples(self.table, loaded.space, catalogue)
        self.sessions = {name: arrays[name] for name in READ}
        self.settings = task.pair.reward
        self.labels = functions.Labels.of(self.settings, self.table, arrays, catalogue)
        self.model, self.device = _placed(loaded, task), str(task.device)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Sessions as tensors, padded to the round's longest list of candidates."""
        return to_batch(take(self.sessions, np.asarray(rows)), self.device)

    def scores(self, z: Tensor, batch: Batch) -> Tensor:
        """[B, N, C] of N query vectors z [B, N, d] a session; gradients pass through."""
        return self.model.score(self.model.users(batch), self.model.items(), batch["candidates"], z)

    @torch.no_grad()
    def rewards(self, z: Tensor, rows: Sequence[int]) -> Tensor:
        """float32 [B, N] of query vectors z [B, N, d]."""
        batch = self.batch(rows)
        scores, exists = self.scores(z, batch).cpu().numpy(), batch["candidates"].cpu().numpy() >= 0
        found = functions.reward(self.settings, scores, self.labels.take(np.asarray(rows)), exists)
        return torch.from_numpy(found.astype(np.float32)).to(z.device)
