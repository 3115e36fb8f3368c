"""The service on Ray Serve: a gateway that answers HTTP, and the two models, each a deployment that batches and scales.

HTTP ─▶ Gateway ─┬─▶ Reasoner   e(x) of session texts, in micro-batches
                 └─▶ Ranker     scores, in micro-batches
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from rgalign_ray import config, progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.connection import join
from rgalign_ray.loop.readers import engine_spec
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.serve import api, web
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.pair import FrozenRanker, FrozenReasoner, PairSpec
from rgalign_ray.serve.session_reader import Row, SessionReader

NAME = "rgalign"
LOCAL = ("127.0.0.1", "localhost", "::1")
READY_DEADLINE_S = 5.0
RETRY_AFTER_S = 1
"""Told to those who are refused for load."""
WAKES_EVERY_S = 3600.0
"""The driver only waits to be interrupted."""
QUERY = {"temperature", "top_p", "max_new_tokens"}


def pair_of(settings: Config) -> PairSpec:
    """The pair that a run directory holds.

    Raises:
        ConfigError: where there is no such run, or the round is not whole.
    """
    place = storage.join(settings.run_uri, "config.json")
    if not storage.exists(place):
        raise ConfigError(f"run_dir: {settings.run_uri} holds no run; `rgalign loop` makes one.")
    made = config.validate(storage.read_json(place))
    run = Run(made.model_copy(update={"run_dir": settings.run_dir, "name": settings.name}))
    round_ = made.rounds if settings.serve.round is None else settings.serve.round
    for artefact in ("sessions", f"rankers_{round_}"):
        if storage.read_manifest(run.uri(artefact)) is None:
            raise ConfigError(f"serve.round: {settings.run_uri} has no whole {artefact}; `rgalign loop` makes it.")
    return PairSpec(
        sessions_uri=run.uri("sessions"),
        ranker_uri=run.uri(f"rankers_{round_}", "qe_rec"),
        engine=engine_spec(run, round_),
        prompt=made.prompt.template,
        round_=round_,
    )


def reader_of(spec: PairSpec, meta: scoring.Meta) -> SessionReader:
    return SessionReader(spec.sessions_uri, meta.feature_spec, Template.load(spec.prompt))


@serve.deployment(name="Reasoner")
class Reasoner:
    """Reads session texts, many at once."""

    def __init__(self, spec: PairSpec, settings: config.Serve, sampling: dict[str, Any]) -> None:
        meta = scoring.load_meta(spec.ranker_uri)
        self.model = FrozenReasoner(spec, reader_of(spec, meta), meta.reasoner_version)
        self.sampling = sampling
        self.one_at_a_time = asyncio.Lock()
        self._read.set_max_batch_size(settings.batch)
        self._read.set_batch_wait_timeout_s(settings.batch_wait_ms / 1000)

    async def read(self, text: str, seed: int | None) -> tuple[np.ndarray, str | None]:
        if seed is None:
            return await self._read(text), None
        async with self.one_at_a_time:
            (found,) = await asyncio.to_thread(self.model.write, [text], [seed], **self.sampling)
        return found

    @serve.batch
    async def _read(self, texts: list[str]) -> list[np.ndarray]:
        async with self.one_at_a_time:
            return await asyncio.to_thread(self.model.read, texts)

    def ready(self) -> bool:
        return True


@serve.deployment(name="Ranker")
class Ranker:
    """Scores sessions, many at once."""

    def __init__(self, spec: PairSpec, settings: config.Serve) -> None:
        self.model = FrozenRanker(spec, reader_of(spec, scoring.load_meta(spec.ranker_uri)))
        self._score.set_max_batch_size(settings.batch)
        self._score.set_batch_wait_timeout_s(settings.batch_wait_ms / 1000)

    async def score(self, row: Row, candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        return await self._score((row, candidates, vector))

    @serve.batch
    async def _score(self, asked: list[tuple[Row, np.ndarray, np.ndarray | None]]) -> list[np.ndarray]:
        rows, candidates, vectors = zip(*asked, strict=True)
        return await asyncio.to_thread(self.model.score, rows, candidates, vectors)

    def ready(self) -> bool:
        return True


@serve.deployment(name="Gateway")
@serve.ingress()
class GatewayDeployment:
    """Answers HTTP."""

    def __init__(
        self, spec: PairSpec, settings: config.Serve, reasoner: DeploymentHandle, ranker: DeploymentHandle
    ) -> None:
        self.models: Sequence[DeploymentHandle] = (reasoner, ranker)
        meta = scoring.load_meta(spec.ranker_uri)
        reader, catalogue = reader_of(spec, meta), Catalogue.load(spec.sessions_uri)
        version = api.ServedVersion(
            version=f"{meta.reasoner_version}-{meta.version}",
            reasoner=meta.reasoner_version or "",
            ranker=meta.version,
            round=spec.round_,
            intents=catalogue.size,
            features=reader.features,
        )
        self.gateway = Gateway(
            settings, reader, catalogue, version, read=reasoner.read.remote, score=ranker.score.remote
        )

    def __serve_build_asgi_app__(self) -> Any:
        return web.build(self.gateway, self.ready)

    async def ready(self) -> bool:
        asked = asyncio.gather(*(model.ready.remote() for model in self.models))
        try:
            return all(await asyncio.wait_for(asked, READY_DEADLINE_S))
        except Exception:  # whatever keeps a model from answering, the service is not ready
            return False


def application(settings: Config) -> Application:
    """The three deployments of a run's pair, bound to one another.

    Raises:
        ConfigError: as `pair_of`.
    """
    spec, it = pair_of(settings), settings.serve
    cpus = {"num_cpus": it.cpus_per_replica}
    sampling = settings.rollout.model_dump(include=QUERY)
    gpu = {"num_gpus": it.reasoner_gpus} if it.reasoner_gpus else {}
    many = {"max_ongoing_requests": 4 * it.batch}
    deployments: tuple[Any, ...] = (Reasoner, Ranker, GatewayDeployment)  # what Serve has made of the classes
    its_reasoner, its_ranker, its_gateway = deployments
    reasoner = its_reasoner.options(num_replicas=it.reasoners, ray_actor_options=cpus | gpu, **many)
    ranker = its_ranker.options(num_replicas=it.rankers, ray_actor_options=cpus, **many)
    gateway = its_gateway.options(
        num_replicas=it.gateways,
        ray_actor_options=cpus,
        max_queued_requests=it.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        **many,
    )
    return gateway.bind(spec, it, reasoner.bind(spec, it, sampling), ranker.bind(spec, it))


def run(settings: Config, blocking: bool = True) -> None:
    """Serves a run's pair, on this machine or on `cluster.address`, until interrupted.

    Raises:
        ConfigError: as `pair_of`.
        InfrastructureError: when Ray does not start, or the address does not answer.
    """
    app, it = application(settings), settings.serve
    if it.host not in LOCAL:
        progress.note(f"serve.host: {it.host} can be reached from other machines, and whoever can reach it is answered")
    join(settings)
    serve.start(http_options={"host": it.host, "port": it.port}, logging_config={"log_level": "WARNING"})
    serve.run(app, name=NAME, logging_config={"log_level": "WARNING"})
    progress.note(f"serving on http://{it.host}:{it.port}: POST /v1/rank; /v1/models and /openapi.json tell the rest")
    while blocking:
        time.sleep(WAKES_EVERY_S)
