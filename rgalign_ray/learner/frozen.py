"""The frozen rankers as learners read them, over the sessions of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgalign_ray import config, storage
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.base import Batch
from rgalign_ray.ranker.batches import take, to_batch
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reward import functions

READ = ("fields", "multi", "history", "candidates")
"""What scores read of a session."""


Read = Callable[[QERec], Tensor]
"""Query vectors [B, N, d] as a ranker makes them of what it is told."""


def rankers(task: LearnerTask) -> list[QERec]:
    """The rankers of the task's frozen pair as they were trained, where its learner computes: what asks them of the
    whole knowledge base, shown or not, needs base rates at their full weight.
    """
    return [_placed(loaded, task) for loaded in _load(task, "log")]


def _load(task: LearnerTask, rank_by: config.RankBy) -> list[scoring.LoadedRanker]:
    assert task.pair is not None
    return [scoring.load(uri, rank_by) for uri in task.pair.rankers]


def _placed(loaded: scoring.LoadedRanker, task: LearnerTask) -> QERec:
    assert isinstance(loaded.model, QERec)
    return loaded.model.to(task.device)


@dataclass(frozen=True, slots=True)
class Part:
    """Some sessions, padded to the longest list of candidates that one of them has."""

    batch: Batch
    labels: functions.Labels
    asked: np.ndarray
    """bool [B, C], the candidates from which a click is told."""


class FrozenRankers:
    """Scores and rewards of query vectors; rows are places in the round's sessions, sorted by id.

    Several rankers are one judge, as in `reward.actor`: the reward is the mean of theirs.

    Args:
        task: the objective's work.
        reasoner_version: of the reasoner whose vectors they read; None where that is the one that learns.

    Raises:
        DataError: where a ranker is of another knowledge base or reasoner, or of other features than the first.
    """

    def __init__(self, task: LearnerTask, reasoner_version: str | None = None) -> None:
        assert task.pair is not None
        loaded = _load(task, task.pair.reward.rank_by)
        catalogue = Catalogue.load(task.pair.log)
        for each in loaded:
            each.require(
                reasoner_version=reasoner_version,
                space_version=loaded[0].meta.space_version,
                intent_ids=catalogue.ids,
            )
        self.table = storage.read_table(task.pair.sessions).sort_by("session_id")
        arrays = examples(self.table, loaded[0].space, catalogue)
        self.sessions = {name: arrays[name] for name in READ}
        self.settings = task.pair.reward
        self.labels = functions.Labels.of(self.settings, self.table, arrays, catalogue)
        self.asked = functions.asked_of(self.settings, arrays)
        self.lengths = (arrays["candidates"] >= 0).sum(axis=1)
        self.models, self.device = [_placed(each, task) for each in loaded], str(task.device)

    def part(self, rows: Sequence[int]) -> Part:
        """The sessions of some rows, where the learner computes."""
        chosen, width = np.asarray(rows), int(self.lengths[rows].max())
        sessions = take(self.sessions, chosen)
        sessions["candidates"] = sessions["candidates"][:, :width]
        return Part(to_batch(sessions, self.device), self.labels.take(chosen, width), self.asked[chosen, :width])

    def scores(self, read: Read, batch: Batch) -> list[Tensor]:
        """[B, N, C] of every ranker; gradients pass through."""
        return [
            model.score(model.users(batch), model.items(), batch["candidates"], read(model)) for model in self.models
        ]

    @torch.no_grad()
    def rewards(self, read: Read, rows: Sequence[int]) -> Tensor:
        """float32 [B, N], where the learner computes."""
        part = self.part(rows)
        found = [
            functions.reward(self.settings, scores.cpu().numpy(), part.labels, part.asked)
            for scores in self.scores(read, part.batch)
        ]
        return torch.from_numpy(np.mean(found, axis=0).astype(np.float32)).to(self.device)
