"""List columns of Arrow tables as flat values and lengths, and back as padded arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray.schema import EVENT, TIMESTAMP


def combined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64 [B], the length of each row's list; a null list has none."""
    return pc.fill_null(pc.list_value_length(combined(column)), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The values of all rows' lists, one after another; null lists add nothing."""
    return pc.list_flatten(combined(column))


def rows(counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts], the row that each flat value belongs to."""
    return np.repeat(np.arange(len(counts)), counts)


def places(counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts], the place of each flat value inside its row's list."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def any_true(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """bool [B], whether a row's list holds a true; what is null does not."""
    counts = lengths(column)
    held = pc.fill_null(flat(column), False).to_numpy(zero_copy_only=False)
    return np.bincount(rows(counts)[held], minlength=len(counts)) > 0


def padded(counts: np.ndarray, values: np.ndarray, width: int, fill: Any) -> np.ndarray:
    """[B, width] of the values' type: each row's values from the left, then `fill`; longer lists are cut at the end."""
    if (counts > width).any():
        values = values[places(counts) < width]
    out = np.full((len(counts), width), fill, dtype=values.dtype)
    out[np.arange(width) < counts[:, None]] = values
    return out


def past_events(table: pa.Table) -> tuple[np.ndarray, pa.StructArray]:
    """The events of `history` that do not lie after the session's `ts`, each row's oldest first.

    Returns the number of events left per row, int64 [B], and the events of all rows one after another.
    Events without a time are left out: they cannot be shown to lie in the past. Events of one moment
    keep the order of the log.
    """
    counts = lengths(table["history"])
    events = flat(table["history"])
    row = rows(counts)
    entry = microseconds(table["ts"])[row]
    time = microseconds(pc.struct_field(events, "ts"))
    keep = np.flatnonzero((time <= entry) & (time != MISSING_TIME))
    order = keep[np.lexsort((time[keep], row[keep]))]
    return np.bincount(row[keep], minlength=len(counts)), events.take(pa.array(order))


def newest_events(table: pa.Table, length: int) -> tuple[pa.ListArray, np.ndarray]:
    """`history` cut to the newest `length` of each row's `past_events`, and how many there were, int64 [B]."""
    counts, events = past_events(table)
    newest = np.repeat(counts, counts) - places(counts) <= length
    kept = events.filter(pa.array(newest))
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, length))]).astype(np.int32)
    parts = [pc.cast(pc.struct_field(kept, field.name), field.type, safe=False) for field in EVENT]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(parts, fields=list(EVENT))), counts


MISSING_TIME = np.iinfo(np.int64).min


def microseconds(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64 [B], microseconds since 1970 in UTC; `MISSING_TIME` for null."""
    ticks = pc.cast(pc.cast(combined(column), TIMESTAMP, safe=False), pa.int64())
    return pc.fill_null(ticks, int(MISSING_TIME)).to_numpy(zero_copy_only=False)
