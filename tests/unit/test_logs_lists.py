"""List columns as padded arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from rgalign_ray.logs import lists

rows_of_numbers = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8)


@given(rows_of_numbers, st.integers(0, 6))
def test_rows_stand_from_the_left_and_long_ones_lose_their_end(rows: list[list[int]], width: int) -> None:
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    values = np.array([value for row in rows for value in row], dtype=np.int32)
    padded = lists.padded(counts, values, width, -1)
    assert padded.shape == (len(rows), width) and padded.dtype == np.int32
    assert padded.tolist() == [(row[:width] + [-1] * width)[:width] for row in rows]


@given(st.lists(st.none() | st.lists(st.none() | st.booleans(), max_size=4), max_size=8))
def test_a_row_without_a_true_has_none_whatever_is_null(rows: list[list[bool | None] | None]) -> None:
    column = pa.chunked_array([pa.array(part, pa.list_(pa.bool_())) for part in (rows[:3], rows[3:])])
    assert lists.any_true(column).tolist() == [any(row or []) for row in rows]
