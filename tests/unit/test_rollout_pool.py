"""The rollout pool without a worker; those are tests/cluster/'s."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rgalign_ray import config, storage
from rgalign_ray.rollout import pool as pools
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import ProposalWorker, Proposed, RolloutWorker, Unit


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


@pytest.mark.parametrize(
    ("worker", "folders"), [(RolloutWorker, ["rollouts", "embeddings"]), (ProposalWorker, ["proposals"])]
)
def test_of_a_unit_for_which_a_teacher_was_asked_again_the_last_files_are_left(
    tmp_path: Path, worker: pools.Worker, folders: list[str]
) -> None:
    """What was proposed is part of its key; all is written already, and no worker starts."""
    unasked, asked = (Proposed("t", query, "stop", "v", 0.7) for query in (None, "where is it"))
    before, now = (Unit(["s"], ["text"], [[each]]) for each in (unasked, asked))
    for folder in folders:
        for unit in (before, now):
            storage.write_bytes(str(tmp_path / folder / f"{unit.key('context')}.parquet"), b"")
    storage.write_bytes(str(tmp_path / pools.QUARANTINE / "of_the_first_try.parquet"), b"")
    pool = RolloutPool(config.Rollout(), {"out_uri": str(tmp_path)}, worker)
    assert list(pool.run([now], "context")) == [(now.key("context"), 1)]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")}
    assert left == {f"{folder}/{now.key('context')}.parquet" for folder in folders}
