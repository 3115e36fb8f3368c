"""One Ray for all tests that need one: it takes seconds to start and is shared by the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rgalign_ray.config import Cluster, Config
from rgalign_ray.loop.connection import connect


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started as the loop starts it: of its own, whatever other cluster is named."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        connect(Config(cluster=Cluster(num_cpus=2, object_store_mb=256)))
    yield
    ray.shutdown()
