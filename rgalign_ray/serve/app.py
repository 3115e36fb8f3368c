"""The service on Ray Serve: a gateway that answers HTTP, and the two models, each a deployment that batches and scales.

HTTP ─▶ Gateway ─┬─▶ Reasoner   e(x) of session texts, in micro-batches
                 └─▶ Ranker     scores, in micro-batches

Each looks at the run directories by itself. A newer version is loaded by the models first, and a look later gateways
send to it, so that no request waits for weights; the version that it follows stays loaded for what is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from rgalign_ray import config, progress, ray_metrics
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError, InfrastructureError, UserError, first_line
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.loop import plan
from rgalign_ray.loop.connection import join
from rgalign_ray.serve import access, api, pair, web
from rgalign_ray.serve.access import Access, RefusedError
from rgalign_ray.serve.admission import RETRY_AFTER_S
from rgalign_ray.serve.counts import Counts
from rgalign_ray.serve.feedback import FeedbackLog
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.pair import FrozenRanker, FrozenReasoner, PairSpec, Source, Versions, variants_of
from rgalign_ray.serve.query_store import QueryStore
from rgalign_ray.serve.session_reader import Row
from rgalign_ray.serve.variants import Variant, Variants

NAME = "rgalign"
LOG = logging.getLogger("rgalign_ray.serve")
LOCAL = ("127.0.0.1", "localhost", "::1")
READY_DEADLINE_S = 5.0
LOAD_DEADLINE_S = 600.0
UP_DEADLINE_S, GROWN_DEADLINE_S = 600.0, 1800.0
"""For the service to come up; the latter where nodes for it are added first."""
ENDED_DEADLINE_S, LOOKS_EVERY_S = 60.0, 0.5
"""For one that is being ended to be gone, and how often that is looked at."""
PROBE_S = 3.0
TRIES = 2
EXAMPLES = 12
WAKES_EVERY_S = 3600.0
"""The driver only waits to be interrupted."""
QUIET = {"log_level": "WARNING"}
FAULTS = (RuntimeError, TimeoutError, RayError, RayServeException)
"""What Ray Serve raises where it does not start, or an application does not."""
_own: set[tuple[str, str]] = set()
"""Jobs of Ray by which this process has deployed the service."""

Loaded = TypeVar("Loaded")


class Served(Generic[Loaded]):
    """What both models have in common: versions, batches that are one at a time, and knowing when one is stuck."""

    def __init__(
        self, settings: Config, versions: Versions[Loaded], each_look: Callable[[], None] = lambda: None
    ) -> None:
        self.settings = settings
        self.versions = versions
        self.busy = asyncio.Lock()
        self.since: float | None = None
        versions.keep(list(_sources(pair.pairs(settings)).values()))
        self.each_look = each_look
        self.watching = asyncio.get_running_loop().create_task(self.watch())

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.serve.watch_s)
            try:
                wanted = await asyncio.to_thread(pair.pairs, self.settings)
                await asyncio.to_thread(self.versions.keep, list(_sources(wanted).values()))
                self.each_look()
            except Exception as error:  # the gateway tells it; what is loaded stays
                LOG.warning("a newer version is not taken: %s", first_line(error))

    async def alone(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """Calls a function in a thread, one call at a time."""
        async with self.busy:
            self.since = time.monotonic()
            try:
                return await asyncio.to_thread(function, *arguments, **named)
            finally:
                self.since = None

    async def model(self, source: Source) -> Loaded:
        return await asyncio.to_thread(self.versions.get, source)

    def check(self) -> None:
        """Raises RuntimeError where a batch has been in work for too long."""
        if self.since is not None and time.monotonic() - self.since > self.settings.serve.wedged_s:
            raise RuntimeError(f"one batch takes longer than {self.settings.serve.wedged_s:g} s")


async def _again(method: Any, *arguments: Any) -> Any:
    """Calls a model's method, of another replica once more where the first one died over it.

    Raises:
        RefusedError: 503 where that one died as well, or has no such version to answer by.
    """
    later = {"Retry-After": str(RETRY_AFTER_S)}
    for _ in range(TRIES):
        try:
            return await method.remote(*arguments)
        except RayActorError:
            continue
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise RefusedError(503, first_line(error.cause), later) from None
            raise
    raise RefusedError(503, f"{TRIES} replicas of the model died over it", later)


@serve.deployment(name="Reasoner")
class Reasoner:
    """Reads session texts, many at once."""

    def __init__(self, settings: Config) -> None:
        self.served = Served(settings, Versions[FrozenReasoner](FrozenReasoner, settings.reasoner))
        self.sampling = settings.rollout.sampling
        self._read.set_max_batch_size(settings.serve.batch)
        self._read.set_batch_wait_timeout_s(settings.serve.batch_wait_ms / 1000)

    async def read(self, source: Source, text: str, seed: int | None) -> tuple[np.ndarray, str | None]:
        if seed is None:
            return await self._read((source, text)), None
        model = await self.served.model(source)
        (found,) = await self.served.alone(model.write, [text], [seed], self.sampling)
        return found

    @serve.batch
    async def _read(self, asked: list[tuple[Source, str]]) -> list[np.ndarray]:
        return await self.served.alone(_by_source, self.served.versions, FrozenReasoner.read, asked)

    async def load(self, source: Source) -> None:
        await self.served.model(source)

    def check_health(self) -> None:
        self.served.check()


@serve.deployment(name="Ranker")
class Ranker:
    """Scores sessions, many at once."""

    def __init__(self, settings: Config) -> None:
        self.served = Served(settings, Versions[FrozenRanker](FrozenRanker, settings.reasoner), self.tell_drift)
        self._score.set_max_batch_size(settings.serve.batch)
        self._score.set_batch_wait_timeout_s(settings.serve.batch_wait_ms / 1000)

    def tell_drift(self) -> None:
        for model in self.served.versions.loaded():
            for feature, psi in model.drift.psi().items():
                ray_metrics.gauge("serve_drift").set(psi, tags={"feature": feature, "version": model.version})

    async def score(self, source: Source, row: Row, candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        return await self._score((source, row, candidates, vector))

    async def parts(self, source: Source, row: Row, candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        model = await self.served.model(source)
        (found,) = await self.served.alone(model.parts, [row], [candidates], [vector])
        return found

    @serve.batch
    async def _score(self, asked: list[tuple[Source, Row, np.ndarray, np.ndarray | None]]) -> list[np.ndarray]:
        return await self.served.alone(_by_source, self.served.versions, FrozenRanker.score, asked)

    async def load(self, source: Source) -> None:
        await self.served.model(source)

    def check_health(self) -> None:
        self.served.check()


def _by_source(versions: Versions[Any], method: Any, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A batch's answers in its order; what asks for one version is answered at once."""
    places: dict[Source, list[int]] = {}
    for place, (source, *_) in enumerate(asked):
        places.setdefault(source, []).append(place)
    answers: list[Any] = [None] * len(asked)
    for source, own in places.items():
        columns = zip(*(asked[place][1:] for place in own), strict=True)
        for place, answer in zip(own, method(versions.get(source), *map(list, columns)), strict=True):
            answers[place] = answer
    return answers


class Exported(Counts):
    """Counts that Prometheus can read as well."""

    def answered(self, path: str, variant: str, timings_ms: Mapping[str, float]) -> None:
        super().answered(path, variant, timings_ms)
        ray_metrics.counter("serve_answers").inc(tags={"path": path, "variant": variant})
        for stage, milliseconds in timings_ms.items():
            ray_metrics.histogram("serve_milliseconds").observe(milliseconds, tags={"stage": stage})

    def add(self, what: str, reason: str = "", number: int = 1) -> int:
        if number:
            ray_metrics.counter(f"serve_{what}").inc(number, tags={"reason": reason} if reason else None)
        return super().add(what, reason, number)


@serve.deployment(name="Gateway")
@serve.ingress()
class GatewayDeployment:
    """Answers HTTP.

    Args:
        settings: of the service, and of the runs whose pairs it serves.
        keys: as `access.digests`, whose file or environment a replica on another node does not have.
        reasoner, ranker: the models.
    """

    def __init__(
        self, settings: Config, keys: Mapping[str, bytes], reasoner: DeploymentHandle, ranker: DeploymentHandle
    ) -> None:
        it = settings.serve
        self.settings = settings
        self.reasoner, self.ranker = reasoner, ranker
        self.access = Access(keys, it.rate_per_minute)
        counts = Exported()
        feedback = None
        if it.feedback is not None:
            feedback = FeedbackLog(it.feedback, lost=lambda number: counts.add("lost_answers", number=number))
        self.stores: dict[str, QueryStore] = {}
        self.pairs = pair.pairs(settings)
        self.refused: str | None = None
        self.gateway = Gateway(it, self.variants(self.pairs), feedback, counts)
        self.watching = asyncio.get_running_loop().create_task(self.watch())

    def __serve_build_asgi_app__(self) -> Any:
        return web.build(self.gateway, self.ready, self.access, lambda: self.refused, self.examples())

    def examples(self) -> list[api.Example]:
        """Of the first variant's run."""
        spec = next(iter(self.pairs.values()))
        number = self.settings.serve.examples
        if number is None:
            number = EXAMPLES if spec.simulated else 0
        reader, rows = spec.reader(), pair.example_sessions(spec, number)
        return [api.Example(name=row["session_id"], session=reader.session(row)) for row in rows]

    def variants(self, pairs: Mapping[str, PairSpec]) -> Variants:
        it = self.settings.serve
        of_name = {variant.name: variant for variant in variants_of(it)}
        total = sum(variant.weight for variant in of_name.values())
        made = []
        for name, spec in pairs.items():
            source = spec.source
            reader, catalogue = spec.reader(), Catalogue.load(spec.sessions_uri)
            reasoner, weight = spec.meta.reasoner_version or "", of_name[name].weight
            version = api.ServedVersion(
                name=name,
                share=weight / total,
                version=spec.version,
                reasoner=reasoner,
                ranker=spec.meta.version,
                round=spec.round_,
                intents=catalogue.size,
                features=reader.features,
                read=[name for name in reader.template.columns if name in reader.features],
            )
            if it.store is not None and spec.reads not in self.stores:
                self.stores[spec.reads] = QueryStore(it.store, spec.reads, spec.dim, 3600 * it.store_max_age_h)
            made.append(
                Variant(
                    name,
                    weight,
                    version,
                    reader,
                    catalogue,
                    read=partial(_again, self.reasoner.read, source),
                    score=partial(_again, self.ranker.score, source),
                    parts=partial(_again, self.ranker.parts, source),
                    store=self.stores.get(spec.reads),
                )
            )
        return Variants(made)

    async def watch(self) -> None:
        """Sends to newer versions once the models have had a look's time to load them, and one of each has."""
        seen = _sources(self.pairs)
        while True:
            await asyncio.sleep(self.settings.serve.watch_s)
            try:
                pairs = await asyncio.to_thread(pair.pairs, self.settings)
                now = _sources(pairs)
                if now != seen:
                    seen = now
                elif now != _sources(self.pairs):
                    await self.loaded(pairs, LOAD_DEADLINE_S)
                    self.gateway.variants = await asyncio.to_thread(self.variants, pairs)
                    self.pairs = pairs
                self.refused = None
            except Exception as error:  # whatever is wrong with what is newer, what is older goes on
                self.refused = first_line(error)

    async def loaded(self, pairs: Mapping[str, PairSpec], deadline_s: float) -> None:
        async with asyncio.timeout(deadline_s):
            for source in _sources(pairs).values():
                await _again(self.reasoner.load, source)
                await _again(self.ranker.load, source)

    def check_health(self) -> None:
        self.gateway.check()

    async def ready(self) -> bool:
        try:
            await self.loaded(self.pairs, READY_DEADLINE_S)
        except Exception:  # whatever keeps a model from answering, the service is not ready
            return False
        return True


def _sources(pairs: Mapping[str, PairSpec]) -> dict[str, Source]:
    return {name: spec.source for name, spec in pairs.items()}


def application(settings: Config) -> Application:
    """The three deployments, bound to one another; keys are read here, and replicas are handed their digests.

    Raises:
        ConfigError: as `pair.find`, and where keys cannot be read.
    """
    settings = settings.model_copy(update={"run_dir": settings.run_uri})  # replicas work in other folders
    it = settings.serve
    pair.pairs(settings)
    keys = access.digests(it)
    gpu = {"num_gpus": it.reasoner_gpus} if it.reasoner_gpus else {}
    deployments: tuple[Any, ...] = (Reasoner, Ranker, GatewayDeployment)  # what Serve has made of the classes
    its_reasoner, its_ranker, its_gateway = deployments
    reasoner = its_reasoner.options(**_scale(it, it.reasoners, it.max_reasoners, **gpu))
    ranker = its_ranker.options(**_scale(it, it.rankers, it.max_rankers))
    gateway = its_gateway.options(
        max_queued_requests=it.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        **_scale(it, it.gateways, it.max_gateways),
    )
    return gateway.bind(settings, keys, reasoner.bind(settings), ranker.bind(settings))


def build(args: dict[str, Any]) -> Application:
    """The application that a configuration file of Ray Serve names, as in cluster/kuberay/rayservice.yaml.

    Args:
        args: `config`, a configuration of the package or a .yaml file that every node has, and `set`, a list of
            settings as in ranker.dim=64.

    Raises:
        ConfigError: for any other argument, and as `config.load` and `application`.
    """
    if not {"config"} <= args.keys() <= {"config", "set"}:
        raise ConfigError(f"args: expected config and, if need be, set; there is {', '.join(args) or 'nothing'}.")
    return application(config.load(args["config"], args.get("set")))


def _scale(it: config.Serve, least: int, most: int | None, **resources: float) -> dict[str, Any]:
    """How many replicas; where they may grow, another comes when those that there are have more than a batch each."""
    replicas: dict[str, Any] = {"num_replicas": least}
    if most is not None and most > least:
        growth = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": it.batch}
        replicas = {"autoscaling_config": growth}
    options = {"num_cpus": it.cpus_per_replica, **resources}
    return {"max_ongoing_requests": it.ongoing, "ray_actor_options": options, **replicas}


def _unused(host: str, port: int) -> None:
    """Refuses a port that somebody listens on: Serve would share it, and answer some of the requests."""
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except (socket.gaierror, UnicodeError):  # the latter for what is no name at all
        raise ConfigError(f"serve.host: {host} cannot be resolved; name an address of this machine.") from None
    except OSError:
        return
    raise ConfigError(f"serve.port: something listens on {host}:{port} already; set another.")


def _job() -> tuple[str, str]:
    """The cluster, and this driver's job on it."""
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id()


def _is_up() -> bool:
    """Whether the cluster has the service, whoever deployed it; one that is being ended is waited for."""
    end = time.monotonic() + ENDED_DEADLINE_S
    while True:
        try:
            found = serve.status().applications.get(NAME)
        except ActorDiedError:  # Ray Serve has ended with it
            return False
        if found is None or found.status != ApplicationStatus.DELETING or time.monotonic() > end:
            return found is not None
        time.sleep(LOOKS_EVERY_S)


def _withdraw() -> None:
    """Ends the service, and Ray Serve where it serves nothing else: proxies that stay keep the address they have."""
    with suppress(*FAULTS):  # where Ray Serve is gone, so is the service
        if serve.status().applications.keys() - {NAME}:
            serve.delete(NAME, _blocking=False)
        else:
            serve.shutdown()


def _deploy(app: Application, it: config.Serve, deadline_s: float) -> None:
    """Has Ray Serve bring the application up; one that was not there before, and does not come up, is withdrawn.

    Raises:
        ConfigError: where another driver serves on this cluster.
        InfrastructureError: when it fails, or is not up within `deadline_s` seconds, with what is not, and why.
    """
    try:
        is_new = not _is_up()
        if is_new:
            _own.discard(_job())  # somebody may have ended what it had deployed
        elif _job() not in _own:
            raise ConfigError(
                "cluster.address: this cluster serves already, and holds no second service; end that one first, by "
                "`rgalign stop` with its job in `rgalign status`, or by `serve shutdown` if its driver was killed."
            )
        serve.start(http_options={"host": it.host, "port": it.port}, logging_config=QUIET)
    except FAULTS as error:
        raise InfrastructureError(f"Ray Serve did not start on {it.host}:{it.port} ({first_line(error)}).") from None
    up: Future[DeploymentHandle] = Future()

    def deploy() -> None:
        try:
            up.set_result(serve.run(app, name=NAME, logging_config=QUIET))
        except Exception as error:
            up.set_exception(error)

    threading.Thread(target=deploy, name="deploy", daemon=True).start()  # it waits for room as long as there is none
    try:
        up.result(deadline_s)
        _own.add(_job())
    except FAULTS as error:
        how = "failed to start" if up.done() else f"is not up after {deadline_s:g} s"
        told = f"the service {how}: {_not_up() or first_line(error)}; {_room()}."
        raise InfrastructureError(told) from None
    finally:
        if is_new and _job() not in _own:  # also where who waits for it is interrupted
            _withdraw()


def _not_up() -> str:
    """Each deployment that is not, with the first line of why, and the last, where Ray puts the error."""
    found = serve.status().applications.get(NAME)
    told = []
    for name, its in found.deployments.items() if found else ():
        if its.status != DeploymentStatus.HEALTHY:
            lines = its.message.strip().splitlines() or [its.status.value.lower()]
            told.append(f"{name}: {' '.join(dict.fromkeys((lines[0], lines[-1].strip()))).rstrip('.')}")
    return "; ".join(told)


def _room() -> str:
    free, there = ray.available_resources(), ray.cluster_resources()
    told = [f"{free.get(name, 0.0):g} of {there[name]:g} {name}s" for name in ("CPU", "GPU") if there.get(name)]
    return f"the cluster has {' and '.join(told) or 'nothing'} free"


def run(settings: Config, blocking: bool = True) -> None:
    """Serves the pairs of runs, on this machine or on `cluster.address`, until interrupted: then the service ends too.

    Raises:
        ConfigError: as `application`, where the host cannot be resolved, or the port is taken, and where the cluster
            could never hold the replicas, and as `_deploy`.
        InfrastructureError: when Ray does not start, or the address does not answer, and as `_deploy`.
    """
    app, it = application(settings), settings.serve
    if not ray.is_initialized() and settings.cluster.address is None:
        _unused(it.host, it.port)
    if it.host not in LOCAL:
        progress.note(f"serve.host: {it.host} can be reached from other machines; serve.keys says who is answered")
    join(settings)
    there = ray.cluster_resources()
    plan.check_served(settings, there.get("CPU", 0.0), there.get("GPU", 0.0))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _deploy(app, it, GROWN_DEADLINE_S if settings.cluster.grows else UP_DEADLINE_S)
    host = f"[{it.host}]" if ":" in it.host else it.host
    progress.note(f"serving on http://{host}:{it.port}: POST /v1/rank; /v1/models and /openapi.json tell the rest")
    try:
        while blocking:
            time.sleep(WAKES_EVERY_S)
    finally:
        if blocking:  # on a cluster it would outlive whoever deployed it, and nobody could tell whose it is
            _withdraw()
