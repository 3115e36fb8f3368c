"""Before anything imports ray: one token for all of the tests' Ray processes, and one thread each."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from rgalign_ray.config import Config
from rgalign_ray.loop import environment

# made anew for every run of the tests, so that no test meets a model that older code made; removed at exit
CACHE = tempfile.TemporaryDirectory(prefix="rgalign-test-")
os.environ.setdefault("RGALIGN_CACHE", CACHE.name)
environment.prepare(Config())
# a busy machine is not a failed test
settings.register_profile("rgalign", deadline=None, max_examples=50)
settings.load_profile("rgalign")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever stands in tests/cluster starts Ray."""
    for item in items:
        if "cluster" in Path(item.fspath).parent.name:
            item.add_marker(pytest.mark.cluster)
