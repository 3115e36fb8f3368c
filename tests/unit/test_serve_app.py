"""The service before Ray Serve has it: what is bound to what, and what a deployment that fails is told by."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from rgalign_ray import config
from rgalign_ray.errors import ConfigError, DataError, InfrastructureError
from rgalign_ray.serve import app, pair
from rgalign_ray.serve.access import RefusedError, digest

KEY = "a-key-of-the-shop"


@pytest.fixture
def _no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served are the pairs of no run at all."""
    monkeypatch.setattr(pair, "pairs", lambda settings: {})


@pytest.mark.usefixtures("_no_run")
def test_gateways_are_told_hashes_of_the_keys_that_stand_where_it_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGALIGN_SERVE_KEYS", f"shop {KEY}")
    for made in (app.application(config.Config()), app.build({"config": "smoke"})):
        settings, keys, *_ = made._bound_deployment.init_args
        assert keys == {"shop": digest(KEY)}
        assert KEY.encode() not in pickle.dumps((settings, keys))

    monkeypatch.delenv("RGALIGN_SERVE_KEYS")  # as on another node

    async def replica() -> None:
        gateway = _plain(app.GatewayDeployment)(settings, keys, None, None)
        gateway.watching.cancel()
        gateway.access.check("/v1/rank", {"authorization": f"Bearer {KEY}"}, "")
        with pytest.raises(RefusedError, match="a known key is asked for"):
            gateway.access.check("/v1/rank", {}, "")

    asyncio.run(replica())


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_that_is_taken_is_refused(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as other:
        try:
            other.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        port = other.getsockname()[1]
        app._unused(host, port)
        other.listen()
        with pytest.raises(
            ConfigError, match=rf"^serve\.port: something listens on {host}:{port} already; set another"
        ):
            app._unused(host, port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
def test_a_host_that_is_none_is_refused_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^serve\.host: .* cannot be resolved; name an address of this machine"):
        app._unused(host, 8000)


class Serve:
    """As `ray.serve`, with an application that comes up, fails, or never does either."""

    def __init__(self, deploys: Callable[[], object], there: tuple[str, ...] = (), status: str = "RUNNING") -> None:
        self.deploys = deploys
        its = SimpleNamespace(status=ApplicationStatus(status))
        self.applications: dict[str, Any] = dict.fromkeys(there, its)
        self.withdrawn: list[str] = []
        self.ended = False

    def start(self, **_: Any) -> None:
        pass

    def run(self, application: Any, name: str, **_: Any) -> object:
        fault = "The deployment failed to start 3 times.\nTraceback:\n  File x\nDataError: no weights.\n"
        told = {"Gateway": ("HEALTHY", ""), "Ranker": ("UPDATING", ""), "Reasoner": ("DEPLOY_FAILED", fault)}
        deployments = {
            deployment: SimpleNamespace(status=DeploymentStatus(status), message=message)
            for deployment, (status, message) in told.items()
        }
        self.applications[name] = SimpleNamespace(status=ApplicationStatus("DEPLOYING"), deployments=deployments)
        return self.deploys()

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications)

    def delete(self, name: str, _blocking: bool) -> None:
        self.withdrawn.append(name)

    def shutdown(self) -> None:
        self.ended = True


JOB = ("127.0.0.1:6379", "01000000")
RAY = SimpleNamespace(
    available_resources=lambda: {"CPU": 0.5},
    cluster_resources=lambda: {"CPU": 2.0, "GPU": 1.0, "memory": 1e9},
    get_runtime_context=lambda: SimpleNamespace(gcs_address=JOB[0], get_job_id=lambda: JOB[1]),
)


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Of a process that has deployed nothing yet."""
    monkeypatch.setattr(app, "ray", RAY)
    monkeypatch.setattr(app, "_own", set())
    return app._own


FAULT = (
    r"Ranker: updating; Reasoner: The deployment failed to start 3 times\. DataError: no weights; "
    r"the cluster has 0\.5 of 2 CPUs and 0 of 1 GPUs free\.$"
)


def fails() -> None:
    raise RuntimeError("Deploying application rgalign failed: Failed to update the deployments ['Reasoner'].")


@pytest.mark.parametrize(
    ("deploys", "told"),
    [
        (fails, rf"^the service failed to start: {FAULT}"),
        (threading.Event().wait, rf"^the service is not up after 0\.2 s: {FAULT}"),
    ],
    ids=["fails", "waits"],
)
@pytest.mark.parametrize("there", [(), (app.NAME,), ("other",)], ids=["new", "its own before", "beside another"])
def test_a_service_that_does_not_come_up_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    own: set[tuple[str, str]],
    deploys: Callable[[], object],
    told: str,
    there: tuple[str, ...],
) -> None:
    serve = Serve(deploys, there)
    monkeypatch.setattr(app, "serve", serve)
    own.add(JOB)  # of now, or of one that has been ended since
    with pytest.raises(InfrastructureError, match=told) as met:
        app._deploy(None, config.Serve(), deadline_s=0.2)  # type: ignore[arg-type]
    assert met.value.__cause__ is None, "else the command line would show where"
    assert (serve.withdrawn, serve.ended) == ([app.NAME] * ("other" in there), not there)


def test_a_service_that_comes_up_is_left_there_and_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "serve", up := Serve(lambda: "handle"))
    app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]
    assert not up.withdrawn and not up.ended
    app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]
    monkeypatch.setattr(app, "serve", Serve(lambda: {}["bug"]))  # type: ignore[index]
    with pytest.raises(KeyError):
        app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]


def test_a_request_is_asked_of_another_replica_and_then_refused() -> None:
    asked: list[int] = []

    def dying(deaths: int) -> Any:
        async def remote(number: int) -> int:
            asked.append(number)
            if len(asked) <= deaths:
                raise RayActorError
            return number

        return SimpleNamespace(remote=remote)

    assert asyncio.run(app._again(dying(1), 7)) == 7 and asked == [7, 7]
    asked.clear()
    with pytest.raises(RefusedError, match="2 replicas of the model died over it") as met:
        asyncio.run(app._again(dying(2), 7))
    assert met.value.status == 503 and met.value.headers


def test_a_version_that_a_replica_does_not_have_is_refused_in_a_sentence_and_a_bug_is_not() -> None:
    def failing(cause: Exception) -> Any:
        async def remote() -> None:
            raise RayTaskError("read", "Traceback", cause, "ray::Ranker", 1, "127.0.0.1").as_instanceof_cause()

        return SimpleNamespace(remote=remote)

    with pytest.raises(RefusedError, match=r"^run holds version b of round 1, not a\.$") as met:
        asyncio.run(app._again(failing(DataError("run holds version b of round 1, not a."))))
    assert met.value.status == 503 and met.value.headers["Retry-After"] == "1"
    with pytest.raises(KeyError):
        asyncio.run(app._again(failing(KeyError("bug"))))


def test_a_service_ends_with_whoever_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "serve", up := Serve(lambda: "handle"))
    for name, does in (("application", lambda _: None), ("join", lambda _: None), ("_unused", lambda *_: None)):
        monkeypatch.setattr(app, name, does)
    monkeypatch.setattr(app, "ray", SimpleNamespace(**vars(RAY), is_initialized=lambda: True))
    monkeypatch.setattr(app.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        app.run(config.Config())
    assert up.ended and not up.withdrawn, "proxies that stay keep their address"
    monkeypatch.setattr(app, "serve", up := Serve(lambda: "handle", ("other",)))
    app.run(config.Config(), blocking=False)
    assert not up.ended and not up.withdrawn, "whoever does not wait for it has it"
    with pytest.raises(KeyboardInterrupt):
        app.run(config.Config())
    assert up.withdrawn == [app.NAME] and not up.ended, "what else is served goes on"


@pytest.mark.parametrize("its", ["RUNNING", "DEPLOYING", "DEPLOY_FAILED", "UNHEALTHY"])
def test_a_second_service_on_a_cluster_is_refused_and_the_first_goes_on(
    monkeypatch: pytest.MonkeyPatch, its: str
) -> None:
    monkeypatch.setattr(app, "serve", up := Serve(lambda: pytest.fail("deployed"), (app.NAME,), its))
    with pytest.raises(ConfigError, match=r"^cluster\.address: this cluster serves already.* `rgalign stop`"):
        app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]
    assert not up.withdrawn and not up.ended


@pytest.mark.parametrize("serve_ends", [False, True])
def test_a_service_that_is_being_ended_is_waited_for(monkeypatch: pytest.MonkeyPatch, serve_ends: bool) -> None:
    up = Serve(lambda: "handle", (app.NAME,), "DELETING")
    looks: list[int] = []
    status = up.status

    def look() -> Any:
        looks.append(len(looks))
        if len(looks) == 3:
            up.applications.clear()
            if serve_ends:
                raise ActorDiedError
        return status()

    monkeypatch.setattr(up, "status", look)
    monkeypatch.setattr(app, "serve", up)
    monkeypatch.setattr(app, "LOOKS_EVERY_S", 0.0)
    app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]
    assert len(looks) == 3 and app.NAME in up.applications


def test_a_service_that_is_interrupted_as_it_comes_up_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "serve", up := Serve(threading.Event().wait))
    monkeypatch.setattr(app.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        app._deploy(None, config.Serve(), deadline_s=10.0)  # type: ignore[arg-type]
    assert up.ended


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_proxies_that_do_not_start_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(app, "serve", up := Serve(lambda: pytest.fail("deployed")))
    monkeypatch.setattr(up, "start", start)
    with pytest.raises(InfrastructureError, match=r"^Ray Serve did not start on 127\.0\.0\.1:8000 \(HTTP proxies"):
        app._deploy(None, config.Serve(), deadline_s=1.0)  # type: ignore[arg-type]


def _plain(deployment: Any) -> Any:
    """The class as it is written, of which Ray Serve's is made."""
    *_, its = [each for each in deployment.func_or_class.__mro__ if each.__module__ == app.__name__]
    return its
