"""Rankers side by side on the same test sessions: metrics with intervals, paired differences, controls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch

from rgalign_ray import config, metrics, storage
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.report import Comparison, Estimate, Row
from rgalign_ray.evaluate.statistics import Estimate as Interval
from rgalign_ray.evaluate.statistics import bootstrap, paired_bootstrap
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.base import Batch
from rgalign_ray.ranker.batches import READOUTS, available, query_input, score_pieces
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.ragged import Index
from rgalign_ray.ranker.rows import Rows
from rgalign_ray.world.oracle import Oracle

SHUFFLE_SEED = 0
CALIBRATION_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Bounds of the bins of expected click shares; most candidates have almost none."""


@dataclass(frozen=True)
class Rung:
    """A ranker of the comparison."""

    name: str
    ranker: str
    """Artefact."""
    embeddings: str | None = None
    """Artefact of the reasoner version it was trained on."""
    query: str = "own"
    """What each session's query tower reads: own, shuffled (another user's), or mean (the same for all)."""
    readout: str | None = None
    """null, prompt or query; None: as `evaluate.readout` says."""
    moved_from: str | None = None
    """Artefact of the reasoner whose embeddings it reads instead, moved by the mean way from there to `embeddings`."""
    any_version: bool = False
    """Reads embeddings of a reasoner that it was not trained on."""
    prior: bool = False
    """Scores candidates by the ranker's frozen base rates alone."""
    control: bool = False
    note: str = ""


@dataclass(frozen=True)
class SessionMetrics:
    """Per-session values of each metric and their weights: float64 [S], nan where a session does not count."""

    values: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    scores: np.ndarray
    """float32 [S, C]."""


class TestSessions:
    """The sessions of role test with their labels and, on the shop, their truth.

    Raises:
        DataError: when no test session has both a click and an unclicked candidate.
    """

    __test__ = False  # the name is no invitation to pytest

    def __init__(self, log_uri: str, truth_uri: str | None, settings: config.Evaluate) -> None:
        self.settings = settings
        self.table = storage.read_table(storage.join(log_uri, "sessions"), filters=pc.field("role") == "test")
        self.table = self.table.sort_by("session_id")
        self.catalogue = Catalogue.load(log_uri)
        self.ids: list[str] = self.table["session_id"].to_pylist()
        self.users: list[str] = self.table["user_id"].to_pylist()
        self.candidates = self.catalogue.candidates(self.table)
        self.mask = self.candidates >= 0
        self.clicks = self.catalogue.padded(self.table["clicks"], self.candidates)
        self.shown = self.catalogue.padded(self.table["shown"], self.candidates)
        self.oracle = Oracle.load(truth_uri) if truth_uri else None
        if not (self.clicks.any(axis=1) & (self.mask & ~self.clicks).any(axis=1)).any():
            raise DataError(f"role test: {len(self.ids)} sessions, none with a click to judge by; raise roles.test.")

    def needs(self) -> np.ndarray | None:
        """bool [S, C]: the candidate that is the true need; None without an oracle."""
        if self.oracle is None:
            return None
        need = np.array([self.catalogue.index[intent] for intent in self.oracle.needs(self.ids)])
        return self.candidates == need[:, None]

    def judge(self, scores: np.ndarray) -> SessionMetrics:
        """Every metric of one ranker's scores [S, C]."""
        k = self.settings.k
        gauc = self._auc(scores, self.mask)
        values = {
            "GAUC": gauc,
            f"Recall@{k}": metrics.recall_at_k(scores, self.clicks, self.mask, k),
            f"NDCG@{k}": metrics.ndcg_at_k(scores, self.clicks, self.mask, k),
        }
        shown = self.shown & self.mask
        among_shown = self._auc(scores, shown)
        if (shown != self.mask).any() and not np.isnan(among_shown).all():
            values["GAUC shown"] = among_shown
        needs = self.needs()
        if self.oracle is not None and needs is not None:
            values[f"need Recall@{k}"] = metrics.recall_at_k(scores, needs, self.mask, k)
            ctr, resolved = self.oracle.expected(self.ids, self.top(scores, k))
            values[f"true CTR@{k}"], values[f"resolved@{k}"] = ctr, resolved
            uniform = np.where(self.oracle.uniform(self.ids), gauc, np.nan)
            if not np.isnan(uniform).all():
                values["GAUC uniform"] = uniform
        ranked, seen = (among.sum(axis=1).astype(np.float64) for among in (self.mask, shown))
        weights = {name: seen if name == "GAUC shown" else ranked for name in values if name.startswith("GAUC")}
        return SessionMetrics(values, weights, scores)

    def _auc(self, scores: np.ndarray, among: np.ndarray) -> np.ndarray:
        """AUC of each session's clicks among some of its candidates, bool [S, C]; nan where there is but one class."""
        auc = metrics.group_auc(scores[among], self.clicks[among], np.nonzero(among)[0])
        found = np.full(len(self.ids), np.nan)
        found[auc.groups] = auc.auc
        return found

    def calibration(self, scores: np.ndarray) -> dict[str, list[float]]:
        """How often a candidate is clicked that softmax(scores) expects to be, over sessions with a click.

        Returns:
            for each bin of `CALIBRATION_EDGES`: how many candidates fell into it (count), and the sums of their
            expected and observed shares of their sessions' clicks. Sums, so that seeds can be added.
        """
        clicked = self.clicks.any(axis=1)
        masked = np.where(self.mask, scores, -np.inf)[clicked].astype(np.float64)
        odds = np.exp(masked - masked.max(axis=1, keepdims=True))
        expected = (odds / odds.sum(axis=1, keepdims=True))[self.mask[clicked]]
        clicks = self.clicks[clicked]
        observed = (clicks / clicks.sum(axis=1, keepdims=True))[self.mask[clicked]]
        place = np.digitize(expected, CALIBRATION_EDGES)
        sums = {"count": None, "expected": expected, "observed": observed}
        bins = len(CALIBRATION_EDGES) + 1
        return {name: np.bincount(place, weights=w, minlength=bins).tolist() for name, w in sums.items()}

    def top(self, scores: np.ndarray, k: int) -> np.ndarray:
        """int [S, k]: intent indices of the best candidates."""
        return top(scores, self.candidates, k)

    def titles(self, scores: np.ndarray, k: int) -> list[list[str]]:
        """Of the first k candidates of each session, or of as many as it has."""
        names = self.catalogue.titles
        return [[names[intent] for intent in row if intent >= 0] for row in self.top(scores, k)]

    def score(self, rung: Rung, rank_by: config.RankBy | None = None) -> np.ndarray:
        """Scores float32 [S, C] of a rung, -inf on padding; by `evaluate.rank_by`, where it is not said by what."""
        ranker = scoring.load(rung.ranker, rank_by or self.settings.rank_by)
        ranker.require(intent_ids=self.catalogue.ids)
        if rung.prior:
            prior = ranker.model.prior.numpy()
            return np.where(self.mask, prior[self.candidates.clip(min=0)], -np.inf)
        rows = self._rows(ranker, rung)
        with torch.inference_mode():
            z = self._queries(ranker, rows, rung) if ranker.model.reads_queries else None
            if z is not None and rung.query == "mean":
                z = z.mean(dim=0).expand_as(z)
            return self._score(ranker, rows, z)

    def between_session_variance(self, rung: Rung) -> float:
        """Share of the query tower's signal that differs between sessions: sum_d Var_s(z_d) / sum_d E_s(z_d^2).

        0 is a tower that says the same of every session, such as which intents are popular.
        """
        ranker = scoring.load(rung.ranker)
        with torch.inference_mode():
            # without the match of texts, which tells sessions apart whatever the tower has learned
            z = ranker.model.parted(self._queries(ranker, self._rows(ranker, rung), rung))[0].double()
        energy = (z**2).mean(dim=0).sum()
        return float(z.var(dim=0, correction=0).sum() / energy) if energy > 0 else 0.0

    def _queries(self, ranker: scoring.LoadedRanker, rows: Rows, rung: Rung) -> torch.Tensor:
        """z float32 [S, d]."""
        reads = available(rows, np.full(len(self.ids), READOUTS[rung.readout or self.settings.readout]))
        return ranker.model.queries(*query_input(rows, reads, slice(None)))

    def _score(self, ranker: scoring.LoadedRanker, rows: Rows, z: torch.Tensor | None) -> np.ndarray:
        model = ranker.model
        items = model.items()

        def score(batch: Batch, piece: Index) -> torch.Tensor:
            return model.score(model.users(batch), items, batch["candidates"], None if z is None else z[piece])

        return score_pieces(rows, score)

    def _rows(self, ranker: scoring.LoadedRanker, rung: Rung) -> Rows:
        embeddings = Embeddings.load(rung.embeddings) if rung.embeddings else None
        if embeddings is not None:
            if not rung.any_version:
                ranker.require(reasoner_version=embeddings.reasoner_version)
            if rung.moved_from:
                embeddings = Embeddings.load(rung.moved_from).moved_to(embeddings)
            if rung.query == "shuffled":
                embeddings = embeddings.shuffled(self.ids, self.users, SHUFFLE_SEED)
        return scoring.with_embeddings(examples(self.table, ranker.space, self.catalogue), embeddings)


def top(scores: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """int [S, k]: intent indices of the best candidates int [S, C], -1 on padding; of equal scores [S, C] by index."""
    masked = np.where(candidates >= 0, scores, -np.inf)
    order = np.lexsort((candidates, -masked), axis=1)[:, :k]
    return np.take_along_axis(candidates, order, axis=1)


def table_rows(
    rungs: list[Rung], judged: list[SessionMetrics], users: list[str], settings: config.Evaluate
) -> list[Row]:
    """The table's rows: each metric's mean and its interval over users."""
    return [
        Row(
            name=rung.name,
            metrics={
                metric: _estimate(
                    bootstrap(
                        values,
                        users,
                        weights=result.weights.get(metric),
                        repetitions=settings.bootstrap,
                        confidence=settings.confidence,
                    )
                )
                for metric, values in result.values.items()
            },
            note=rung.note,
            control=rung.control,
        )
        for rung, result in zip(rungs, judged, strict=True)
    ]


def compare(
    better: Rung,
    worse: Rung,
    ours: SessionMetrics,
    baseline: SessionMetrics,
    users: list[str],
    settings: config.Evaluate,
) -> list[Comparison]:
    """Paired differences of two rungs in every metric. One seed: separated speaks of users, not of seeds."""
    comparisons = []
    for metric, values in ours.values.items():
        difference = paired_bootstrap(
            values,
            baseline.values[metric],
            users,
            weights=ours.weights.get(metric),
            repetitions=settings.bootstrap,
            confidence=settings.confidence,
        )
        comparisons.append(
            Comparison(
                better=better.name,
                worse=worse.name,
                metric=metric,
                difference=_estimate(difference),
                separated=difference.separated,
            )
        )
    return comparisons


def _estimate(interval: Interval) -> Estimate:
    return Estimate(value=interval.mean, low=interval.users[0], high=interval.users[1])
