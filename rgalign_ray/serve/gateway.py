"""From a request to ranked intents: which way to the latent query, within which time, and what is put at which place.

  store   a vector kept for the user                    ──▶ ┐
  live    the reasoner reads the session, in a batch    ──▶ ├─▶ ranker, in a batch ──▶ the top k, or a slate drawn
  null    the ranker alone, an input it was trained on  ──▶ ┘

A plain class: what it waits for are functions, which `app.py` makes of Ray Serve's handles.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rgalign_ray import config
from rgalign_ray.evaluate import plackett_luce
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.reasoner.engine import sample_seed
from rgalign_ray.serve import api
from rgalign_ray.serve.session_reader import Row, SessionError, SessionReader

LOG = logging.getLogger("rgalign_ray.serve")
Read = Callable[[str, int | None], Awaitable[tuple[np.ndarray, str | None]]]
"""A session's text, and the seed of a query that is to be written down: e(x) and that query."""
Score = Callable[[Row, np.ndarray, np.ndarray | None], Awaitable[np.ndarray]]
"""As `FrozenRanker.score`, of one session."""


class Store(Protocol):
    """Vectors kept for users."""

    def get(self, user_id: str) -> tuple[np.ndarray, str | None] | None:
        """e(x) and the latent query."""
        ...


@dataclass
class Stopwatch:
    """Milliseconds of the stages of one request."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1000

    def lap(self, name: str) -> None:
        self.stages[name] = round(self.elapsed_ms - sum(self.stages.values()), 3)

    def report(self) -> dict[str, float]:
        return {**self.stages, "total": round(self.elapsed_ms, 3)}


class Gateway:
    """Answers requests.

    Args:
        settings: budgets and exploration.
        reader: makes rows and texts of sessions.
        catalogue: the intents.
        version: what answers, for `/v1/models`.
        read: asks the reasoner.
        score: asks the ranker.
        store: None where there is none.
    """

    def __init__(
        self,
        settings: config.Serve,
        reader: SessionReader,
        catalogue: Catalogue,
        version: api.ServedVersion,
        read: Read,
        score: Score,
        store: Store | None = None,
    ) -> None:
        self.settings = settings
        self.reader = reader
        self.catalogue = catalogue
        self.version = version
        self.everything = np.arange(catalogue.size, dtype=np.int32)
        self.fallbacks: Counter[str] = Counter()
        """Requests that the reasoner was asked for and did not answer, by the error's name."""
        self._read, self._score, self._store = read, score, store

    async def rank_batch(self, requests: list[api.RankRequest]) -> list[api.RankResponse]:
        """Answers several requests at once, or refuses them all for the fault of one."""
        places = [f"requests.{number}." for number in range(len(requests))]
        prepared = [self._prepare(request, place) for request, place in zip(requests, places, strict=True)]
        answers = (self._answer(it, *made) for it, made in zip(requests, prepared, strict=True))
        return list(await asyncio.gather(*answers))

    async def rank(self, request: api.RankRequest) -> api.RankResponse:
        """Answers one request.

        Raises:
            SessionError: for a field that is wrong.
        """
        return await self._answer(request, *self._prepare(request))

    def _prepare(self, request: api.RankRequest, where: str = "") -> tuple[Row, np.ndarray, Stopwatch]:
        watch = Stopwatch()
        return self.reader.row(request.session, f"{where}session"), self._candidates(request, where), watch

    async def _answer(
        self, request: api.RankRequest, row: Row, candidates: np.ndarray, watch: Stopwatch
    ) -> api.RankResponse:
        request_id = request.request_id or uuid.uuid4().hex
        seed = sample_seed(0, 0, request_id, 0)
        watch.lap("read")
        path, vector, query = await self._latent_query(request, row, seed, watch)
        watch.lap("reasoner")
        scores = await self._score(row, candidates, vector)
        slate, propensities = self._slate(scores, request.k, seed)
        watch.lap("ranker")
        return api.RankResponse(
            request_id=request_id,
            intents=[
                api.RankedIntent(
                    intent_id=self.catalogue.ids[candidates[column]],
                    title=self.catalogue.titles[candidates[column]],
                    score=float(scores[column]),
                    propensity=float(propensity),
                )
                for column, propensity in zip(slate, propensities, strict=True)
            ],
            latent_query=query,
            version=self.version.version,
            path=path,
            timings_ms=watch.report(),
        )

    def _candidates(self, request: api.RankRequest, where: str) -> np.ndarray:
        if request.candidates is None:
            return self.everything
        place = f"{where}candidates"
        for number, intent in enumerate(request.candidates):
            if intent not in self.catalogue.index:
                raise SessionError(f"{place}.{number}", f"'{intent}' is not one of the {self.catalogue.size} intents")
        if len(set(request.candidates)) < len(request.candidates):
            raise SessionError(place, "an intent is there twice")
        return np.array([self.catalogue.index[intent] for intent in request.candidates], np.int32)

    async def _latent_query(
        self, request: api.RankRequest, row: Row, seed: int, watch: Stopwatch
    ) -> tuple[api.Path, np.ndarray | None, str | None]:
        wanted = request.path
        if wanted in ("auto", "store") and self._store is not None:
            kept = self._store.get(request.session.user_id)
            if kept is not None:
                return "store", *kept
        if wanted in ("auto", "live"):
            (text,) = self.reader.texts([row])
            asked = self._read(text, seed if request.explain else None)
            if wanted == "live":  # a path that is asked for by name is waited for
                return "live", *await asked
            left = self.settings.budget_ms - self.settings.ranker_ms - watch.elapsed_ms
            try:
                return "live", *await asyncio.wait_for(asked, max(left, 0.0) / 1000)
            except Exception as error:  # late, overloaded or dead: there is an answer without it
                reason = type(error).__name__
                if not self.fallbacks[reason]:
                    LOG.warning("the reasoner gives no answer (%s); the ranker answers alone", reason)
                self.fallbacks[reason] += 1
        return "null", None, None

    def _slate(self, scores: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the intents to show, the best first, and the probability of each given those above it."""
        k = min(k, len(scores))
        temperature = self.settings.explore_temperature
        if temperature is None:
            return plackett_luce.best(scores[None], k)[0], np.ones(k)
        logits = plackett_luce.logits(scores[None], np.ones((1, len(scores)), bool), temperature)
        slate = plackett_luce.sample(logits, k, np.random.default_rng(seed))
        return slate[0], plackett_luce.conditional(logits, slate)[0]
