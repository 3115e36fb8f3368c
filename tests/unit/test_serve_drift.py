"""The population stability index of what is served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import storage
from rgalign_ray.logs.partitions import PartitionWriter
from rgalign_ray.serve import pair
from rgalign_ray.serve.drift import HISTORY, Drift


def features(fields: np.ndarray, events: int = 2) -> dict[str, np.ndarray]:
    history = np.zeros((len(fields), 5), np.int32)
    history[:, :events] = 3
    return {"fields": fields, "history": history}


def test_of_two_known_distributions() -> None:
    reference = np.array([[1]] * 600 + [[2]] * 400)
    drift = Drift(["tab"], features(reference), least=10)
    drift.add(features(np.array([[1]] * 300 + [[2]] * 700)))
    told = drift.psi()
    p, q = np.array([0.3, 0.7]), np.array([0.6, 0.4])
    assert told["tab"] == pytest.approx(np.sum((p - q) * np.log(p / q)), abs=0.01)
    assert told[HISTORY] == pytest.approx(0.0, abs=0.01)
    drift.add(features(np.array([[1]] * 5000), events=5))
    assert drift.psi()[HISTORY] > 1.0, "only the last sessions count"


def test_what_was_never_learned_from_and_what_is_rare_are_one_bin() -> None:
    random = np.random.default_rng(0)
    rare = np.concatenate([np.ones(9000, int), random.integers(100, 1000, 1000)])[:, None]
    drift = Drift(["shop"], features(rare), least=1)
    drift.add(features(np.concatenate([np.ones(900, int), np.arange(5000, 5100)])[:, None]))
    assert drift.psi()["shop"] == pytest.approx(0.0, abs=0.01)
    nothing = Drift(["shop"], features(rare), least=1)
    nothing.add(features(np.arange(5000, 6000)[:, None]))
    assert nothing.psi()["shop"] > 2.0


def test_few_sessions_tell_nothing() -> None:
    drift = Drift(["tab"], features(np.ones((100, 1), int)), least=3)
    drift.add(features(np.ones((2, 1), int)))
    assert drift.psi() == {}
    drift.add(features(np.ones((1, 1), int)))
    assert drift.psi().keys() == {"tab", HISTORY}


@pytest.mark.parametrize("place", ["{}", "file://{}/"])
def test_what_is_served_is_held_against_sessions_with_their_own_regions(tmp_path: Path, place: str) -> None:
    uri, regions = place.format(tmp_path), ["A/B", "M Y", "SG"]
    writer = PartitionWriter(storage.join(uri, "sessions"))
    entries = pa.array([0] * len(regions), pa.timestamp("us"))
    writer.write(pa.table({"region": regions, "ts": entries, "session_id": regions, "role": ["rank"] * len(regions)}))
    writer.close()
    read = pair._sessions(SimpleNamespace(sessions_uri=uri), "rank", ["session_id", "region"], files=8)  # type: ignore[arg-type]
    assert [row for table in read for row in table.to_pylist()] == [{"session_id": r, "region": r} for r in regions]
