"""The service before Ray Serve has it: what is bound to what, and what a deployment that fails is told by."""

from __future__ import annotations

import asyncio
import pickle
import socket
from typing import Any

import pytest

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
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


def _plain(deployment: Any) -> Any:
    """The class as it is written, of which Ray Serve's is made."""
    *_, its = [each for each in deployment.func_or_class.__mro__ if each.__module__ == app.__name__]
    return its
