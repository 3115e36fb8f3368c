"""What the rollout pool asks of a cluster that can grow; its workers are tests/cluster/'s."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rgalign_ray import config
from rgalign_ray.rollout import pool as pools
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Unit


def test_what_a_cluster_grew_for_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(pools, "request_resources", lambda **its: asked.append(its))
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)
    settings = config.Rollout(workers=3, min_workers=1, in_flight_per_worker=1, node_labels={"rgalign": "rollout"})
    pool = RolloutPool(settings, {"out_uri": str(tmp_path)})
    monkeypatch.setattr(pool, "_room", lambda: 0)
    monkeypatch.setattr(pool, "_start", lambda: pools._Member(object(), None, time.monotonic()))
    for number in range(3):
        pool._queue.append(pools._Task(str(number), Unit([], [])))
    pool._resize()
    pool.close()
    worker = {"CPU": settings.cpus_per_worker}
    assert asked == [
        {"bundles": [worker] * 3, "bundle_label_selectors": [{"rgalign": "rollout"}] * 3},
        {"bundles": [], "bundle_label_selectors": []},
    ]
