from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs_data import INTENTS, SCHEMA, SPEC, session, table

from rgalign_ray import schema
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import columns, examples
from rgalign_ray.logs.features import FeatureSpace

SETS = pa.Table.from_pylist(
    [{"candidate_set": "b", "intents": ["refund"]}, {"candidate_set": "a", "intents": ["speed_up", "cancel"]}],
    schema=schema.CANDIDATE_SETS,
)


def test_intents_are_indexed_in_the_order_of_their_ids() -> None:
    catalogue = Catalogue(INTENTS)
    assert catalogue.ids == ["cancel", "refund", "speed_up"] == catalogue.intents["intent_id"].to_pylist()
    assert catalogue.index == {"cancel": 0, "refund": 1, "speed_up": 2}
    assert catalogue.size == 3
    assert catalogue.titles[2] == "Speed up parcel delivery"
    assert catalogue.categories[1] == "refund"


def test_candidates_keep_their_order_and_are_padded() -> None:
    rows = table(session(0), session(1, candidates=["refund"]), session(2, candidates=[]))
    found = Catalogue(INTENTS).candidates(rows)
    assert found.dtype == np.int32
    assert found.tolist() == [[2, 0, 1], [1, -1, -1], [-1, -1, -1]]
    assert Catalogue(INTENTS).candidates(rows.slice(1, 1)).tolist() == [[1]], "slices of a table are read as such"


def test_named_candidate_sets_have_one_width_for_all_batches() -> None:
    catalogue = Catalogue(INTENTS, SETS)
    columns = pa.schema([("candidate_set", pa.string())])
    found = catalogue.candidates(pa.Table.from_pylist([{"candidate_set": "b"}], schema=columns))
    assert found.tolist() == [[1, -1]]
    with pytest.raises(DataError, match="'c'"):
        catalogue.candidates(pa.Table.from_pylist([{"candidate_set": "c"}], schema=columns))


def test_unknown_intents_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="'teleport'"):
        Catalogue(INTENTS).candidates(table(session(candidates=["teleport"])))
    with pytest.raises(DataError, match="candidate_sets: intent 'refund'"):
        Catalogue(INTENTS.slice(0, 2), SETS)


def test_load_reads_sets_only_where_they_are(tmp_path) -> None:
    pq.write_table(INTENTS, tmp_path / "intents.parquet")
    assert Catalogue.load(str(tmp_path)).size == 3
    pq.write_table(SETS, tmp_path / "candidate_sets.parquet")
    assert Catalogue.load(str(tmp_path)).candidates(pa.table({"candidate_set": ["a"]})).tolist() == [[2, 0]]


def test_examples_hold_parallel_arrays_of_one_batch() -> None:
    rows = table(session(0), session(1, candidates=["refund"], shown=[True], clicks=[True]))
    space = FeatureSpace.fit(SPEC, [rows], 4)
    found = examples(rows.select(columns(space, rows.column_names)), space, Catalogue(INTENTS))
    assert found["candidates"].shape == found["shown"].shape == found["clicks"].shape == (2, 3)
    assert found["shown"].tolist() == [[True, True, False], [True, False, False]]
    assert found["clicks"].tolist() == [[True, False, False], [True, False, False]]
    assert found["session_id"] == ["s0", "s1"]
    assert found["history"].shape == (2, 4)


def test_columns_of_examples_hold_nothing_else() -> None:
    space = FeatureSpace.fit(SPEC, [table(session())])
    assert columns(space, [*SCHEMA.names, "role", "query_text"]) == [
        *["session_id", "status", "days_late", "tags", "history", "ts", "candidates", "shown", "clicks"]
    ]


def test_session_keys_are_fixed_for_ever() -> None:
    keys = session_keys([f"s{i}" for i in range(1000)])
    assert keys.dtype == np.int64
    assert keys.min() >= 0
    assert len(set(keys.tolist())) == 1000
    assert session_keys(["s1"])[0] == keys[1]
    assert keys[0] == 7261679073387372761
