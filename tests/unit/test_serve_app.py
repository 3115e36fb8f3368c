"""The service before Ray Serve has it: what is bound to what, and what a deployment that fails is told by."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from rgalign_ray import config
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


def _plain(deployment: Any) -> Any:
    """The class as it is written, of which Ray Serve's is made."""
    *_, its = [each for each in deployment.func_or_class.__mro__ if each.__module__ == app.__name__]
    return its
