"""Intent Hit Rate: which sessions it asks, and what counts as a hit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config, storage
from rgalign_ray.evaluate.hit_rate import hit_rate_sessions, hits, vectors

INTENTS = ["parcel late", "refund money", "change password"]


def embed(texts: list[str]) -> np.ndarray:
    """Counts of the letters a … z, of any length."""
    return np.array([[text.count(chr(letter)) for letter in range(97, 123)] for text in texts], dtype=np.float16)


def test_a_query_hits_where_its_nearest_intent_is_the_need() -> None:
    queries = ["my parcel is late late late", "password", "refund", None]
    found = hits(queries, [0, 2, 0, 1], vectors(INTENTS, embed), embed)
    np.testing.assert_array_equal(found, [1, 1, 0, np.nan])
    assert np.isnan(hits([None], [0], vectors(INTENTS, embed), embed)).all()


def test_more_queries_than_a_batch_are_read_alike() -> None:
    queries = [INTENTS[i % 3] for i in range(200)]
    assert hits(queries, [i % 3 for i in range(200)], vectors(INTENTS, embed), embed).mean() == 1.0


def test_sessions_are_drawn_by_hash_from_the_test_sessions_where_truth_is_known(tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(60)]
    roles = ["test" if i % 3 else "rank" for i in range(60)]
    table = pa.table({"session_id": ids, "role": roles})
    storage.write_table(str(tmp_path / "sessions/dt=2026-01-01/region=SG/part-00000.parquet"), table)
    drawn = hit_rate_sessions(str(tmp_path), "truth", config.Evaluate(hit_rate_sessions=10))
    assert len(set(drawn)) == 10
    assert all(roles[ids.index(i)] == "test" for i in drawn)
    assert drawn != sorted(drawn, key=ids.index)
    more = hit_rate_sessions(str(tmp_path), "truth", config.Evaluate(hit_rate_sessions=20))
    assert more[:10] == drawn
    assert hit_rate_sessions(str(tmp_path), None, config.Evaluate(hit_rate_sessions=10)) == []
    assert hit_rate_sessions(str(tmp_path), "truth", config.Evaluate()) == []


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_only_directions_count(scale: float) -> None:
    def scaled(texts: list[str]) -> np.ndarray:
        return embed(texts).astype(np.float32) * scale

    queries = ["parcel parcel", "money"]
    np.testing.assert_array_equal(
        hits(queries, [0, 1], vectors(INTENTS, scaled), scaled), hits(queries, [0, 1], vectors(INTENTS, embed), embed)
    )
