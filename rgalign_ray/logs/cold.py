"""Cold intents: a share of the knowledge base that test sessions alone have, and that they alone are tested on."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray.config import Roles
from rgalign_ray.logs import lists
from rgalign_ray.logs.roles import NONE

PARALLEL = ("candidates", "shown", "clicks", "position", "propensity", "resolved")
MIN_CANDIDATES = 2
"""Fewer leave nothing to rank."""


def cold_intents(intent_ids: list[str], roles: Roles) -> pa.Array:
    """The intents that are cold, as strings: those of the smallest hashes of `roles.seed` and id."""

    def place(intent: str) -> bytes:
        return hashlib.blake2b(f"{roles.seed}/cold/{intent}".encode(), digest_size=8).digest()

    return pa.array(sorted(intent_ids, key=place)[: round(roles.cold_share * len(intent_ids))], pa.string())


def withhold(table: pa.Table, role: np.ndarray, cold: pa.Array) -> tuple[pa.Table, np.ndarray]:
    """A batch of sessions and their roles, str [B], with every cold intent in test sessions alone.

    Test sessions keep their cold candidates and their whole history; all others lose their cold candidates
    and the events of their history that are named like a cold intent. What is parallel to the candidates
    follows them. Sessions left with fewer than `MIN_CANDIDATES` candidates get role `none`.
    """
    test = role == "test"
    counts = lists.lengths(table["candidates"])
    starts = np.cumsum(counts) - counts
    stays = _is_in(lists.flat(table["candidates"]), cold) == test[lists.rows(counts)]
    columns = {}
    for name in PARALLEL:
        if name in table.column_names:
            long = lists.lengths(table[name])  # an optional list may be null: it has no values
            columns[name] = _kept(table[name], stays[starts[lists.rows(long)] + lists.places(long)])
    events = _is_in(pc.struct_field(lists.flat(table["history"]), "event"), cold)
    columns["history"] = _kept(table["history"], ~events | test[lists.rows(lists.lengths(table["history"]))])
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table, np.where(lists.lengths(table["candidates"]) < MIN_CANDIDATES, NONE, role)


def _is_in(values: pa.Array, cold: pa.Array) -> np.ndarray:
    return pc.is_in(pc.cast(values, pa.string()), value_set=cold).to_numpy(zero_copy_only=False)


def _kept(column: pa.ChunkedArray, keep: np.ndarray) -> pa.ListArray:
    """The lists with those of their flat values that a mask keeps; null lists stay null."""
    counts = lists.lengths(column)
    left = np.bincount(lists.rows(counts)[keep], minlength=len(counts))
    offsets = pa.array(np.concatenate([[0], np.cumsum(left)]), pa.int32())
    null = lists.combined(pc.is_null(column))
    return pa.ListArray.from_arrays(offsets, lists.flat(column).filter(pa.array(keep)), mask=null)
