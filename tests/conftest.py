"""Before anything imports ray: one token for all of the tests' Ray processes, and one thread each."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RGALIGN_CACHE", str(Path(tempfile.gettempdir()) / "rgalign-test-cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever stands in tests/cluster starts Ray."""
    for item in items:
        if "cluster" in Path(item.fspath).parent.name:
            item.add_marker(pytest.mark.cluster)
