"""The reward model: the frozen ranker judges what each latent query is worth.

  rollouts + embeddings e(x,q) of a unit ──▶ user and item towers once a session ──▶ scores of N queries at once
  ──▶ reward, uplift over the null query, the other judges' rewards, the auditor's

`RewardModel` is a plain class; `remote` makes it an actor. Judges are rankers of the same data and the
same encoder under different seeds: the first one's word is the reward, the others measure its noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.exceptions import GetTimeoutError, RayTaskError

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.fit import to_batch
from rgalign_ray.reward import functions
from rgalign_ray.reward.auditor import Auditor, AuditorSpec


class RewardModel:
    """Scores rollouts with frozen rankers.

    Args:
        rankers: ranker artefacts (QE-Rec), the reward's own first.
        log_uri: the ingested log, for the knowledge base.
        settings: which reward.
        auditor: a second pair that judges the same queries, if there is one.

    Raises:
        DataError: when a ranker was trained on another catalogue or feature space than the first.
    """

    def __init__(
        self, rankers: list[str], log_uri: str, settings: config.Reward, auditor: AuditorSpec | None = None
    ) -> None:
        torch.set_num_threads(1)
        self.judges = [scoring.load(uri) for uri in rankers]
        self.catalogue = Catalogue.load(log_uri)
        self.settings = settings
        self.auditor = Auditor(auditor) if auditor else None
        for judge in [*self.judges, *([self.auditor.ranker] if self.auditor else [])]:
            judge.require(space_version=self.judges[0].meta.space_version, intent_ids=self.catalogue.ids)

    def score(self, sessions: pa.Table, rollouts_uri: str, embeddings_uri: str) -> tuple[pa.Table, np.ndarray]:
        """Judges the rollouts of one unit.

        Args:
            sessions: the unit's rows of the `sessions` table, in any order.
            rollouts_uri, embeddings_uri: the unit's two files.

        Returns:
            scored: `schema.SCORED`, a row per rollout, by session and sample.
            judged: float64 [sessions, N, judges], every judge's reward; nan for invalid rollouts. Sessions
                stand as in `scored`.

        Raises:
            DataError: when the embeddings are of another reasoner version than a judge was trained on.
        """
        rollouts = storage.read_table(rollouts_uri).sort_by([("session_id", "ascending"), ("sample", "ascending")])
        vectors = storage.read_table(embeddings_uri).sort_by([("id", "ascending"), ("sample", "ascending")])
        vectors = vectors.filter(pc.equal(vectors["readout"], "query"))
        assert vectors["id"].to_pylist() == rollouts["session_id"].to_pylist(), (
            f"{embeddings_uri}: not of {rollouts_uri}"
        )
        ids = list(dict.fromkeys(rollouts["session_id"].to_pylist()))
        embeddings = np.stack(vectors["embedding"].to_numpy()).reshape(
            len(ids), -1, vectors.schema.field("embedding").type.list_size
        )
        for judge in self.judges:
            judge.require(reasoner_version=vectors["reasoner_version"][0].as_py())
        sessions = sessions.sort_by("session_id")
        batch = examples(sessions, self.judges[0].space, self.catalogue)
        labels = functions.Labels.of(self.settings, sessions, batch, self.catalogue)
        valid = rollouts["fault"].is_null().to_numpy().reshape(len(ids), -1)
        embeddings = np.where(valid[..., None], embeddings, np.float16(0))  # metrics refuse scores that are nan
        rewards, nulls = zip(*(self._rewards(judge, batch, labels, embeddings) for judge in self.judges), strict=True)
        judged = np.where(valid[..., None], np.stack(rewards, axis=-1), np.nan)
        audit = np.full(valid.shape, np.nan)
        if self.auditor:
            read = self.auditor.embeddings(sessions, rollouts["query"].to_pylist())
            audit = np.where(valid, self._rewards(self.auditor.ranker, batch, labels, read)[0], np.nan)
        return self._table(rollouts, judged[..., 0], nulls[0], audit), judged

    def _rewards(
        self, judge: scoring.LoadedRanker, batch: dict[str, Any], labels: functions.Labels, embeddings: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One judge's rewards [S, N] of the queries, and [S] of the null query."""
        scores = query_scores(judge.model, to_batch(batch), torch.from_numpy(embeddings.astype(np.float32)))
        mask = batch["candidates"] >= 0
        rewards = functions.reward(self.settings, scores, labels, mask)
        return rewards[:, :-1], rewards[:, -1]

    def _table(self, rollouts: pa.Table, reward: np.ndarray, null: np.ndarray, audit: np.ndarray) -> pa.Table:
        uplift = reward - null[:, None]
        return pa.table(
            [
                *(rollouts[name] for name in ("session_id", "sample", "query")),
                pa.array(reward.ravel(), pa.float32(), from_pandas=True),
                pa.array(uplift.ravel(), pa.float32(), from_pandas=True),
                pa.array(audit.ravel(), pa.float32(), from_pandas=True),
                rollouts["fault"].is_null(),
                rollouts["fault"],
                pa.repeat(self.judges[0].meta.version, rollouts.num_rows),
            ],
            schema=schema.SCORED,
        )


@torch.inference_mode()
def query_scores(model: Ranker, batch: Batch, embeddings: torch.Tensor) -> np.ndarray:
    """Scores float32 [S, N + 1, C] of N queries a session, and last of the null query.

    User and item towers run once a session, whatever N.

    Args:
        model: a ranker that reads queries.
        batch: the sessions.
        embeddings: float32 [S, N, De].
    """
    sessions, n, _ = embeddings.shape
    is_null = torch.zeros(sessions, n + 1, dtype=torch.bool)
    is_null[:, -1] = True
    z = model.queries(torch.cat([embeddings, torch.zeros_like(embeddings[:, :1])], dim=1), is_null)
    return model.score(model.users(batch), model.items(), batch["candidates"], z).numpy()


def remote(cpus: float, *args: Any) -> Any:
    """A `RewardModel` as a Ray actor that holds `cpus` CPUs; a restart is a start."""
    actor = ray.remote(RewardModel).options(num_cpus=cpus, max_restarts=3, max_task_retries=3)
    return actor.remote(*args)


def score_all(
    actor: Any, requests: Iterable[tuple[pa.Table, str, str]], in_flight: int = 4, deadline_s: float = 600.0
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Results of `RewardModel.score` for each request, in their order, with at most `in_flight` at the actor.

    Raises:
        InfrastructureError: when one takes longer than its deadline.
    """
    waiting: deque[Any] = deque()
    for request in requests:
        waiting.append(actor.score.remote(*request))
        if len(waiting) == in_flight:
            yield _result(waiting.popleft(), deadline_s)
    while waiting:
        yield _result(waiting.popleft(), deadline_s)


def _result(call: Any, deadline_s: float) -> tuple[pa.Table, np.ndarray]:
    try:
        return ray.get(call, timeout=deadline_s)
    except GetTimeoutError:
        raise InfrastructureError(
            f"rewards: the reward model gave no answer for {deadline_s:.0f} s; the same command tries again."
        ) from None
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None
