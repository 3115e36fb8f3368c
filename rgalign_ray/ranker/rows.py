"""Sessions as the arrays a ranker reads, and as the Arrow tables in which Ray Data carries them to workers.

This module imports no torch: Ray Data starts processes for it, and each would wait for that import.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rgalign_ray.logs import lists
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.roles import fold_of
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.ragged import Ragged
from rgalign_ray.ranker.sizes import Sizes

Rows = dict[str, Any]
"""A ranker's sessions as arrays: fields, multi, history, candidates, shown, clicks, session_key; valid [n],
sessions that choose the epoch; prompt [n, De] and query [n, De] as float16, has_prompt and has_query [n].
The columns of `LISTS` are padded arrays [n, C] where rows come from `examples`, and `Ragged` where they are kept."""

READ = ("prompt", "has_prompt", "query", "has_query")
"""What a row holds of embeddings."""
SHUFFLED = "shuffled_"
"""Before a name of `READ`: the same of another user's session, for the control."""

FOLD = "fold"
"""Of the session's user, where rankers leave one out."""

LISTS = {"candidates": np.int32(-1), "shown": False, "clicks": False}
"""Columns whose width differs from batch to batch, and what pads them."""


def with_embeddings(arrays: dict[str, Any], embeddings: Embeddings | None) -> Rows:
    """Examples joined with e(x) and e(x,q) by session."""
    rows = {name: values for name, values in arrays.items() if name != "session_id"}
    keys = arrays["session_key"]
    if embeddings is None:
        nothing = {"prompt": np.zeros((len(keys), 0), np.float16), "has_prompt": np.zeros(len(keys), bool)}
        return {**rows, **nothing, "query": nothing["prompt"], "has_query": nothing["has_prompt"]}
    rows["prompt"], rows["has_prompt"] = embeddings.lookup(keys, "prompt")
    rows["query"], rows["has_query"] = embeddings.lookup(keys, "query")
    return rows


def training_table(
    sessions: pa.Table,
    space: dict[str, Any],
    catalogue: tuple[pa.Table, pa.Table | None],
    embeddings: Embeddings | None,
    shuffled: Embeddings | None,
    valid_role: str,
    folds: int = 0,
) -> pa.Table:
    """A batch of sessions as training rows; with `shuffled`, the control's embeddings stand beside the own.

    `space` is what `FeatureSpace.from_dict` takes, `catalogue` what `Catalogue` takes.
    """
    arrays = examples(sessions, FeatureSpace.from_dict(space), Catalogue(*catalogue))
    rows = with_embeddings(arrays, embeddings)
    if shuffled is not None:
        others = with_embeddings(arrays, shuffled)
        rows |= {SHUFFLED + name: others[name] for name in READ}
    rows["valid"] = np.array([role == valid_role for role in sessions["role"].to_pylist()], dtype=bool)
    if folds:
        rows[FOLD] = fold_of(sessions["user_id"].to_pylist(), folds)
    return to_table(rows)


def to_table(rows: Rows) -> pa.Table:
    """Rows as fixed-size lists; columns without width are left out, and candidates lose their padding."""
    width = (rows["candidates"] >= 0).sum(axis=1)
    columns = {}
    for name, values in rows.items():
        if name in LISTS:
            keep = np.arange(values.shape[1]) < width[:, None]
            offsets = pa.array(np.concatenate([[0], np.cumsum(width)]).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values[keep]))
        elif values.ndim == 1:
            columns[name] = pa.array(values)
        elif values[0:1].size:
            flat = np.ascontiguousarray(values).reshape(-1)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(values.shape[1:])))
    return pa.table(columns)


def reading(rows: Rows, shuffled: bool, without: int | None = None) -> Rows:
    """The rows as one ranker reads them: with their own embeddings or with the control's, and all of them but those
    of the fold `without` that do not choose the epoch.
    """
    own = {name: values for name, values in rows.items() if not name.startswith(SHUFFLED) and name != FOLD}
    if shuffled:
        own |= {name: rows[SHUFFLED + name] for name in READ}
    if without is None or not len(rows["valid"]):
        return own
    kept = np.flatnonzero(rows["valid"] | (rows[FOLD] != without))
    return {name: values[kept] for name, values in own.items()}


def ragged(rows: Rows) -> Rows:
    """The rows without padding; places whose candidate is -1 are left out."""
    if isinstance(rows["candidates"], Ragged):
        return rows
    there = rows["candidates"] >= 0
    return {name: Ragged.of(v, there, LISTS[name]) if name in LISTS else v for name, v in rows.items()}


def from_tables(tables: list[pa.Table], sizes: Sizes, shuffled: bool = False) -> Rows:
    """The tables' rows, one after another and ragged; `shuffled` says that they hold the control's embeddings too.

    A worker that was dealt no table gets zero rows of the right shapes, and takes part in every step.
    """
    table = pa.concat_tables(tables).combine_chunks() if tables else to_table(_none(sizes, shuffled))
    rows: Rows = {}
    for name in table.column_names:
        column = lists.combined(table[name])
        if name in LISTS:
            values = lists.flat(column).to_numpy(zero_copy_only=False)
            rows[name] = Ragged(values, lists.lengths(column), LISTS[name])
        elif pa.types.is_fixed_size_list(column.type):
            rows[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        else:
            rows[name] = column.to_numpy(zero_copy_only=False)
    for name, shape in _shapes(sizes, shuffled).items():
        values = rows.get(name, np.zeros((len(table), 0), np.int32))
        rows[name] = values.reshape(len(table), *shape) if len(table) else np.zeros((0, *shape), values.dtype)
    return rows


def _shapes(sizes: Sizes, shuffled: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "fields": (sizes.num_fields,),
        "multi": (sizes.num_multi, sizes.multi_length),
        "history": (sizes.history_length,),
    }
    for prefix in ("", SHUFFLED) if shuffled else ("",):
        shapes |= {prefix + "prompt": (sizes.embedding_dim,), prefix + "query": (sizes.embedding_dim,)}
    return shapes


def _none(sizes: Sizes, shuffled: bool) -> Rows:
    rows: Rows = {"session_key": np.zeros(0, np.int64), "valid": np.zeros(0, bool)}
    for prefix in ("", SHUFFLED) if shuffled else ("",):
        rows |= {prefix + name: np.zeros(0, bool) for name in READ if name.startswith("has_")}
    rows |= {name: np.zeros((0, 1), np.asarray(fill).dtype) for name, fill in LISTS.items()}
    for name, shape in _shapes(sizes, shuffled).items():
        rows[name] = np.zeros((0, *shape), np.float16 if name.endswith(("prompt", "query")) else np.int32)
    return rows
