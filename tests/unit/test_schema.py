"""A table that is not what it should be is refused by file, column and expectation."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgalign_ray import schema
from rgalign_ray.errors import DataError

TABLES = {
    "intents": schema.INTENTS,
    "candidate_sets": schema.CANDIDATE_SETS,
    "sessions": schema.SESSIONS,
    "rollouts": schema.ROLLOUTS,
    "scored": schema.SCORED,
    "selected": schema.SELECTED,
    "quarantine": schema.QUARANTINE,
    "embeddings": schema.embeddings(8),
}
FOREIGN = pa.duration("s")
"""A type that no table has."""


@pytest.mark.parametrize("expected", TABLES.values(), ids=TABLES)
def test_each_table_is_itself(expected: pa.Schema) -> None:
    schema.check(expected, expected, "here")
    schema.check(pa.schema(list(expected)[::-1]), expected, "in another order")


@given(name=st.sampled_from(sorted(TABLES)), data=st.data())
def test_the_missing_or_foreign_column_is_named(name: str, data: st.DataObject) -> None:
    expected = TABLES[name]
    place = data.draw(st.integers(0, len(expected) - 1))
    field = expected.field(place)
    words = re.escape(f"part-7.parquet: column '{field.name}' ")
    with pytest.raises(DataError, match=f"^{words}is missing; expected {re.escape(str(field.type))}"):
        schema.check(expected.remove(place), expected, "part-7.parquet")
    with pytest.raises(DataError, match=f"^{words}is {re.escape(str(FOREIGN))}; expected {re.escape(str(field.type))}"):
        schema.check(expected.set(place, pa.field(field.name, FOREIGN)), expected, "part-7.parquet")


def test_the_first_fault_is_the_one_told() -> None:
    with pytest.raises(DataError, match="column 'intent_id' is missing"):
        schema.check(pa.schema([("title", pa.int8())]), schema.INTENTS, "here")


def test_further_columns_are_refused_unless_allowed() -> None:
    wider = schema.SESSIONS.append(pa.field("order_tab", pa.string()))
    schema.check(wider, schema.SESSIONS, "here", extra=True)
    with pytest.raises(DataError, match="here: column 'order_tab' is not part of this table"):
        schema.check(wider, schema.SESSIONS, "here")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pa.large_string(), pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.large_list(pa.large_string()), pa.list_(pa.string())),
        (pa.list_(pa.int64(), 4), pa.list_(pa.int32())),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.string())),
        (pa.timestamp("ns", "UTC"), schema.TIMESTAMP),
        (pa.int64(), pa.int16()),
        (pa.float64(), pa.float32()),
        (pa.list_(pa.struct([*schema.EVENT, pa.field("more", pa.int8())])), pa.list_(schema.EVENT)),
    ],
    ids=str,
)
def test_types_that_cast_are_equal(found: pa.DataType, expected: pa.DataType) -> None:
    schema.check(pa.schema([("x", found)]), pa.schema([("x", expected)]), "here")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pa.string(), pa.int32()),
        (pa.int32(), pa.float32()),
        (pa.bool_(), pa.int16()),
        (pa.string(), schema.TIMESTAMP),
        (pa.bool_(), pa.list_(pa.bool_())),
        (pa.list_(pa.int8()), pa.list_(pa.bool_())),
        (pa.dictionary(pa.int32(), pa.int64()), pa.string()),
        (pa.list_(pa.struct(list(schema.EVENT)[:2])), pa.list_(schema.EVENT)),
        (pa.list_(pa.struct([("event", pa.int8()), *list(schema.EVENT)[1:]])), pa.list_(schema.EVENT)),
    ],
    ids=str,
)
def test_types_that_do_not_cast_differ(found: pa.DataType, expected: pa.DataType) -> None:
    with pytest.raises(DataError, match=r"here: column 'x' is .*; expected "):
        schema.check(pa.schema([("x", found)]), pa.schema([("x", expected)]), "here")
