"""The reward model: the frozen ranker judges what each latent query is worth.

  rollouts + embeddings e(x,q) of a unit ──▶ user and item towers once a session ──▶ scores of N queries at once
  ──▶ reward, uplift over the null query, the last judge's reward, the auditor's

`RewardModel` is a plain class; `remote` makes it an actor. Judges are rankers of the same data and the
same encoder under different seeds: the last measures the noise of the reward, which is the mean of the others' (reward
model ensembles, Coste et al. 2024: what one of them is wrong about, the others seldom are).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rgalign_ray import config, ray_metrics, ray_stacks, schema, storage
from rgalign_ray.errors import InfrastructureError, first_line
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.roles import fold_of
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.embeddings import matrix
from rgalign_ray.reward import functions
from rgalign_ray.reward.auditor import Auditor, AuditorSpec
from rgalign_ray.reward.judging import judge_queries

DEADLINE_S = 600.0
"""Longest wait for the rewards of one unit."""


@dataclass(frozen=True)
class QueryUnit:
    """The latent queries of a work unit, in order of session and sample."""

    rollouts: pa.Table
    session_ids: list[str]
    valid: np.ndarray
    """bool [S, N]."""
    embeddings: np.ndarray
    """float16 [S, N, H], e(x,q); zeros where a query is not valid, since metrics refuse scores that are nan."""
    reasoner_version: str

    @classmethod
    def load(cls, rollouts_uri: str, embeddings_uri: str) -> QueryUnit:
        """The unit of its two files."""
        rollouts = storage.read_table(rollouts_uri).sort_by([("session_id", "ascending"), ("sample", "ascending")])
        vectors = storage.read_table(embeddings_uri).sort_by([("id", "ascending"), ("sample", "ascending")])
        vectors = vectors.filter(pc.equal(vectors["readout"], "query"))
        assert vectors["id"].to_pylist() == rollouts["session_id"].to_pylist(), (
            f"{embeddings_uri}: not of {rollouts_uri}"
        )
        ids = list(dict.fromkeys(rollouts["session_id"].to_pylist()))
        dim = vectors.schema.field("embedding").type.list_size
        embeddings = matrix(vectors["embedding"], dim).reshape(len(ids), -1, dim)
        valid = rollouts["fault"].is_null().to_numpy().reshape(len(ids), -1)
        known = np.where(valid[..., None], embeddings, np.float16(0))
        return cls(rollouts, ids, valid, known, vectors["reasoner_version"][0].as_py())


class RewardModel:
    """Scores rollouts with frozen rankers.

    Args:
        rankers: ranker artefacts (QE-Rec), a list a judge, at least two: of each fold of users the ranker that has not
            learned from it, or one ranker for all.
        log_uri: the ingested log, for the knowledge base.
        settings: which reward.
        auditor: a second pair that judges the same queries, if there is one.

    Raises:
        DataError: when a ranker was trained on another catalogue or feature space than the first.
    """

    def __init__(
        self, rankers: list[list[str]], log_uri: str, settings: config.Reward, auditor: AuditorSpec | None = None
    ) -> None:
        torch.set_num_threads(1)
        self.judges = [[scoring.load(uri, settings.rank_by) for uri in folds] for folds in rankers]
        self.first = self.judges[0][0]
        self.catalogue = Catalogue.load(log_uri)
        self.settings = settings
        self.auditor = Auditor(auditor) if auditor else None
        for ranker in [*chain(*self.judges), *([self.auditor.ranker] if self.auditor else [])]:
            ranker.require(space_version=self.first.meta.space_version, intent_ids=self.catalogue.ids)

    def score(self, sessions: pa.Table, rollouts_uri: str, embeddings_uri: str) -> pa.Table:
        """Judges the rollouts of one unit.

        Args:
            sessions: the unit's rows of the `sessions` table, in any order.
            rollouts_uri, embeddings_uri: the unit's two files.

        Returns:
            `schema.SCORED`, a row per rollout, by session and sample.

        Raises:
            DataError: when the embeddings are of another reasoner version than a judge was trained on.
        """
        unit = QueryUnit.load(rollouts_uri, embeddings_uri)
        rollouts, valid = unit.rollouts, unit.valid
        for ranker in chain(*self.judges):
            ranker.require(reasoner_version=unit.reasoner_version)
        sessions = sessions.sort_by("session_id")
        batch = examples(sessions, self.first.space, self.catalogue)
        folds = len(self.judges[0])
        fold = fold_of(sessions["user_id"].to_pylist(), folds) if folds > 1 else np.zeros(len(sessions), np.int64)
        labels = functions.Labels.of(self.settings, sessions, batch, self.catalogue)
        rewards, nulls = zip(
            *(self._by_fold(judge, fold, batch, labels, unit.embeddings) for judge in self.judges), strict=True
        )
        reward, null = np.mean(rewards[:-1], axis=0), np.mean(nulls[:-1], axis=0)
        reward, second = (np.where(valid, said, np.nan) for said in (reward, rewards[-1]))
        audit = np.full(valid.shape, np.nan)
        if self.auditor:
            asked = self.auditor.rewards(sessions, rollouts["query"].to_pylist(), self.catalogue, self.settings)
            audit = np.where(valid, asked, np.nan)
        ensembles = zip(*self.judges[:-1], strict=True)  # a tuple of rankers a fold
        versions = np.array(["+".join(ranker.meta.version for ranker in rankers) for rankers in ensembles])
        return self._table(rollouts, reward, null, second, audit, versions[fold])

    def _by_fold(
        self,
        judge: list[scoring.LoadedRanker],
        fold: np.ndarray,
        batch: dict[str, Any],
        labels: functions.Labels,
        embeddings: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One judge's rewards [S, N] of queries and [S] of the null query, each session by the ranker of its fold."""
        rewards, null = np.empty(embeddings.shape[:2]), np.empty(len(embeddings))
        for number, ranker in enumerate(judge):
            rows = np.flatnonzero(fold == number)
            if len(rows):
                part = {name: values[rows] for name, values in batch.items() if name != "session_id"}
                rewards[rows], null[rows] = judge_queries(
                    ranker, part, labels.take(rows), embeddings[rows], self.settings
                )
        return rewards, null

    @staticmethod
    def _table(
        rollouts: pa.Table,
        reward: np.ndarray,
        null: np.ndarray,
        second: np.ndarray,
        audit: np.ndarray,
        versions: np.ndarray,
    ) -> pa.Table:
        uplift = reward - null[:, None]
        return pa.table(
            [
                *(rollouts[name] for name in ("session_id", "sample", "query")),
                *(
                    pa.array(values.ravel(), pa.float32(), from_pandas=True)
                    for values in (reward, uplift, second, audit)
                ),
                rollouts["fault"].is_null(),
                rollouts["fault"],
                pa.array(versions.repeat(reward.shape[1])),
            ],
            schema=schema.SCORED,
        )


def remote(rankers: list[list[str]], log_uri: str, settings: config.Reward, auditor: AuditorSpec | None = None) -> Any:
    """A `RewardModel` of the same arguments as a Ray actor; a restart is a start."""
    actor = ray_stacks.actor(RewardModel, "score", DEADLINE_S).options(
        num_cpus=settings.cpus, label_selector=settings.node_labels, max_restarts=3, max_task_retries=3
    )
    return actor.remote(rankers, log_uri, settings, auditor)


Request = tuple[pa.Table, str, str]
"""Arguments of `RewardModel.score`."""


def score_all(
    actors: Sequence[Any], requests: Iterable[Request], in_flight: int = 2, deadline_s: float = DEADLINE_S
) -> Iterator[tuple[Request, pa.Table]]:
    """Requests and what `RewardModel.score` says to them, in their order, with at most `in_flight` at each actor.

    Raises:
        InfrastructureError: when one takes longer than its deadline, with what the actor was at.
    """
    waiting: deque[tuple[Request, Any, Any]] = deque()
    for actor, request in zip(cycle(actors), requests):
        waiting.append((request, actor.place.remote(), actor.score.remote(*request)))
        if len(waiting) == in_flight * len(actors):
            done, place, call = waiting.popleft()
            yield done, _result(place, call, deadline_s)
    for done, place, call in waiting:
        yield done, _result(place, call, deadline_s)


def _result(place: Any, call: Any, deadline_s: float) -> pa.Table:
    """The answer to a call; `place` is the call before it, which says where it is worked on."""
    try:
        scored: pa.Table = ray.get(call, timeout=deadline_s)
    except GetTimeoutError:
        raise InfrastructureError(
            f"rewards: the reward model gave no answer for {deadline_s:.0f} s; the same command tries again. What it "
            f"was at:\n{ray_stacks.stacks(place)}"
        ) from None
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except RayError as error:
        raise InfrastructureError(
            f"rewards: the reward model died more often than it is started again ({first_line(error)}); the same "
            "command tries again."
        ) from None
    ray_metrics.counter("reward_queries").inc(scored.num_rows)
    return scored
