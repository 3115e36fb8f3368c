"""From a request to ranked intents: which way to the latent query, within which time, and what is put at which place.

  store   a vector kept for the user                    ──▶ ┐
  live    the reasoner reads the session, in a batch    ──▶ ├─▶ ranker, in a batch ──▶ the top k, or a slate drawn
  null    the ranker alone, an input it was trained on  ──▶ ┘

A plain class: what it waits for are functions, which `app.py` makes of Ray Serve's handles.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

import numpy as np

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate import plackett_luce
from rgalign_ray.reasoner.engine import sample_seed
from rgalign_ray.serve import api
from rgalign_ray.serve.access import RefusedError
from rgalign_ray.serve.admission import RETRY_AFTER_S, Admission
from rgalign_ray.serve.counts import Counts
from rgalign_ray.serve.feedback import BUSY_S, Answer, FeedbackLog
from rgalign_ray.serve.query_store import Kept, QueryStore
from rgalign_ray.serve.session_reader import Row, SessionError
from rgalign_ray.serve.variants import Variant, Variants

PARTS = tuple(api.ScoreParts.model_fields)
LEAST_OF_BATCH = 4
"""The models answer a fourth of a batch almost as quickly as one session."""
WRITTEN_DEADLINE_S = BUSY_S + 5.0
"""For the disk: what has waited for another gateway's transaction as long as it may is told by then."""
LOG = logging.getLogger("rgalign_ray.serve")

Answered = TypeVar("Answered")


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

    @property
    def of_budget_ms(self) -> float:
        """Without the reasoner, who has a deadline of its own, or is waited for by name."""
        return self.elapsed_ms - self.stages.get("reasoner", 0.0)

    def report(self) -> dict[str, float]:
        return {**self.stages, "total": round(self.elapsed_ms, 3)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that nothing is wrong with."""

    request: api.RankRequest
    variant: Variant
    row: Row
    place: str
    """The session's, as refusals name it."""
    candidates: np.ndarray
    received: datetime
    """In UTC."""
    watch: Stopwatch


class Gateway:
    """Answers requests.

    Args:
        settings: budgets and exploration.
        variants: what answers; may be set anew at any time.
        feedback: None where none is kept.
        counts: told of what happens, for whoever watches.
    """

    def __init__(
        self,
        settings: config.Serve,
        variants: Variants,
        feedback: FeedbackLog | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.settings = settings
        self.variants = variants
        self.counts = counts or Counts()
        self.feedback = feedback
        least = max(1, settings.batch // LEAST_OF_BATCH)
        self.admission = Admission(settings.budget_ms, least, min(settings.batch, settings.ongoing), settings.ongoing)

    async def rank_batch(self, requests: list[api.RankRequest]) -> list[api.RankResponse]:
        """Answers several requests at once, or refuses them all for the fault of one.

        Raises:
            SessionError, RefusedError: as `rank`.
        """
        self._enter(len(requests))
        try:
            places = [f"requests.{number}." for number in range(len(requests))]
            prepared = [self._prepare(request, place) for request, place in zip(requests, places, strict=True)]
            return list(await asyncio.gather(*map(self._answer, prepared)))
        finally:
            self.admission.leave(len(requests))  # how long a batch takes depends on its size

    async def rank(self, request: api.RankRequest) -> api.RankResponse:
        """Answers one request.

        Raises:
            SessionError: for a field that is wrong; PromptError for a session that the template fails on, where `live`
                is asked for by name.
            RefusedError: 429 where more are in work than are answered in time, 503 where a model does not answer.
        """
        self._enter(1)
        took_ms = None
        try:
            prepared = self._prepare(request)
            answer = await self._answer(prepared)
            took_ms = prepared.watch.of_budget_ms
            return answer
        finally:
            self.admission.leave(1, took_ms)

    async def told(self, request: api.FeedbackRequest) -> api.FeedbackResponse:
        """Keeps feedback.

        Raises:
            RefusedError: 404 where none is kept, 507 where it cannot be written, or is not within `WRITTEN_DEADLINE_S`.
        """
        body = request.model_dump(exclude={"request_id"}, exclude_defaults=True)
        await self._written(self._log().told(request.request_id, body))
        self.counts.add("feedback")
        return api.FeedbackResponse(request_id=request.request_id)

    async def refresh(self, request: api.RefreshRequest) -> api.RefreshResponse:
        """Reads a user's situation ahead of her visit, for every variant that keeps vectors.

        Raises:
            SessionError: for a field that is wrong; PromptError for a session that the template fails on.
            RefusedError: 503 where the reasoner does not answer, 507 where it cannot be written.
        """
        written: set[QueryStore] = set()
        names = []
        for name, variant in self.variants.by_name.items():
            if variant.store is None:
                continue
            if variant.store not in written:
                row = variant.reader.row(request.session)
                vector, _ = await self._in_time("reasoner", variant.read(variant.reader.text(row), None))
                with _on_disk():
                    await asyncio.to_thread(variant.store.put, Kept(request.session.user_id, row["ts"], vector))
                written.add(variant.store)
            names.append(name)
        return api.RefreshResponse(variants=names)

    async def forget(self, user_id: str) -> api.ForgetResponse:
        """Removes what is kept of a user.

        Raises:
            RefusedError: 507 where it cannot be written.
        """
        # first, since it is done even if who asks hangs up
        done = None if self.feedback is None else self.feedback.forget(user_id, api.now())
        stores = [variant.store for variant in self.variants.by_name.values() if variant.store is not None]
        if stores:  # of one folder, and each forgets for all versions in it
            with _on_disk():
                await asyncio.to_thread(stores[0].forget, user_id)
        return api.ForgetResponse(answers=0 if done is None else await self._written(done))

    def check(self) -> None:
        """Raises RuntimeError where it can no longer do what it is there for, and has to be started anew."""
        if self.feedback is not None:
            self.feedback.check()

    def _enter(self, number: int) -> None:
        try:
            self.admission.enter(number)
        except RefusedError:
            self.counts.add("overload", number=number)
            raise

    def _log(self) -> FeedbackLog:
        if self.feedback is None:
            raise RefusedError(404, "no feedback is kept: serve.feedback names no folder")
        return self.feedback

    async def _written(self, done: Future[int]) -> int:
        with _on_disk():
            async with asyncio.timeout(WRITTEN_DEADLINE_S):
                # what was asked for is done, whether or not who asked hangs up
                return await asyncio.shield(asyncio.wrap_future(done))

    def _prepare(self, request: api.RankRequest, where: str = "") -> Prepared:
        watch, received = Stopwatch(), api.now()
        variants = self.variants  # one and the same for all of the request, whatever follows it meanwhile
        if request.variant is None:
            variant = variants.of(request.session.user_id)
        elif request.variant in variants.by_name:
            variant = variants.by_name[request.variant]
        else:
            raise SessionError(f"{where}variant", f"is none of {', '.join(variants.by_name)}")
        place = f"{where}session"
        row = variant.reader.row(request.session, place)
        return Prepared(request, variant, row, place, _candidates(request, variant, where), received, watch)

    async def _answer(self, asked: Prepared) -> api.RankResponse:
        request, variant, watch = asked.request, asked.variant, asked.watch
        request_id = request.request_id or uuid.uuid4().hex
        seed = sample_seed(0, 0, request_id, 0)
        watch.lap("read")
        path, vector, query = await self._latent_query(asked, seed)
        watch.lap("reasoner")
        scores = await self._in_time("ranker", variant.score(asked.row, asked.candidates, vector))
        slate, propensities = self._slate(scores, request.k, seed)
        parts: Sequence[api.ScoreParts | None] = [None] * len(slate)
        if request.explain:
            taken_apart = await self._in_time("ranker", variant.parts(asked.row, asked.candidates[slate], vector))
            parts = [api.ScoreParts(**dict(zip(PARTS, map(float, its), strict=True))) for its in taken_apart]
        watch.lap("ranker")
        chosen = asked.candidates[slate]
        if self.feedback is not None:
            self.feedback.shown(_kept(request_id, asked, chosen, propensities, path))
        self.counts.answered(path, variant.name, watch.report())
        catalogue = variant.catalogue
        return api.RankResponse(
            request_id=request_id,
            intents=[
                api.RankedIntent(
                    intent_id=catalogue.ids[intent],
                    title=catalogue.titles[intent],
                    score=float(scores[column]),
                    propensity=float(propensity),
                    parts=its,
                )
                for intent, column, propensity, its in zip(chosen, slate, propensities, parts, strict=True)
            ],
            latent_query=query,
            version=variant.version.version,
            variant=variant.name,
            path=path,
            timings_ms=watch.report(),
        )

    async def _in_time(self, model: str, answer: Awaitable[Answered]) -> Answered:
        """Waits no longer than a model may be at one batch, after which it is started anew."""
        try:
            async with asyncio.timeout(self.settings.wedged_s):
                return await answer
        except TimeoutError:
            told = f"the {model} has not answered within {self.settings.wedged_s:g} s"
            raise RefusedError(503, told, {"Retry-After": str(RETRY_AFTER_S)}) from None

    async def _latent_query(self, asked: Prepared, seed: int) -> tuple[api.Path, np.ndarray | None, str | None]:
        request, variant = asked.request, asked.variant
        wanted = request.path
        if wanted in ("auto", "store") and variant.store is not None:
            try:
                kept = variant.store.get(request.session.user_id)
            except (sqlite3.Error, OSError, DataError) as error:  # there are other ways to an answer
                self._passed_over("the query store", error)
            else:
                if kept is not None:
                    return "store", *kept
        if wanted in ("auto", "live"):
            if wanted == "live":  # a path that is asked for by name is waited for
                return "live", *await self._in_time("reasoner", self._read(asked, seed))
            left = self.settings.budget_ms - self.settings.ranker_ms - asked.watch.elapsed_ms
            try:
                return "live", *await asyncio.wait_for(self._read(asked, seed), max(left, 0.0) / 1000)
            except Exception as error:  # late, overloaded, dead or given no text: there is an answer without it
                self._passed_over("the reasoner", error)
        return "null", None, None

    async def _read(self, asked: Prepared, seed: int) -> tuple[np.ndarray, str | None]:
        text = asked.variant.reader.text(asked.row, asked.place)
        return await asked.variant.read(text, seed if asked.request.explain else None)

    def _passed_over(self, what: str, error: Exception) -> None:
        reason = type(error).__name__
        if self.counts.add("fallbacks", reason) == 1:
            LOG.warning("%s gives no answer (%s); others answer without it", what, reason)

    def _slate(self, scores: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the intents to show, the best first, and the probability of each given those above it."""
        k = min(k, len(scores))
        temperature = self.settings.explore_temperature
        if temperature is None:
            return plackett_luce.best(scores[None], k)[0], np.ones(k)
        logits = plackett_luce.logits(scores[None], np.ones((1, len(scores)), bool), temperature)
        slate = plackett_luce.sample(logits, k, np.random.default_rng(seed))
        return slate[0], plackett_luce.conditional(logits, slate)[0]


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        told = f"the disk has not taken it within {WRITTEN_DEADLINE_S:g} s"
        raise RefusedError(507, told, {"Retry-After": "1"}) from None
    except (sqlite3.Error, OSError) as error:
        raise RefusedError(507, f"it could not be written ({error})", {"Retry-After": "1"}) from None


def _candidates(request: api.RankRequest, variant: Variant, where: str) -> np.ndarray:
    if request.candidates is None:
        return variant.everything
    index, place = variant.catalogue.index, f"{where}candidates"
    for number, intent in enumerate(request.candidates):
        if intent not in index:
            raise SessionError(f"{place}.{number}", f"'{intent}' is not one of the {len(index)} intents")
    if len(set(request.candidates)) < len(request.candidates):
        raise SessionError(place, "an intent is there twice")
    return np.array([index[intent] for intent in request.candidates], np.int32)


def _kept(request_id: str, asked: Prepared, chosen: np.ndarray, propensities: np.ndarray, path: str) -> Answer:
    ids = asked.variant.catalogue.ids
    history = [{**event, "ts": event["ts"].isoformat()} for event in asked.row["history"]]
    return Answer(
        request_id=request_id,
        user_id=asked.request.session.user_id,
        ts=asked.row["ts"],
        body={
            "row": {name: value for name, value in asked.row.items() if name != "ts"} | {"history": history},
            "candidates": asked.request.candidates,
            "slate": [ids[intent] for intent in chosen],
            "propensity": [float(propensity) for propensity in propensities],
            "version": asked.variant.version.version,
            "variant": asked.variant.name,
            "path": path,
            "received": asked.received.isoformat(),
        },
    )
