"""Sessions as the arrays that rankers read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import storage
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.features import FeatureSpace


def examples(table: pa.Table, space: FeatureSpace, catalogue: Catalogue) -> dict[str, Any]:
    """Features, candidates and labels of a table of sessions.

    Returns:
        fields, multi, history: as `FeatureSpace.transform`.
        candidates: int32 [B, C], intent indices, -1 where padded.
        shown, clicks: bool [B, C], parallel to candidates.
        session_key: int64 [B], a stable hash of the session id.
        session_id: list of B strings.
    """
    candidates = catalogue.candidates(table)
    ids = table["session_id"].to_pylist()
    return {
        **space.transform(table),
        "candidates": candidates,
        "shown": catalogue.padded(table["shown"], candidates),
        "clicks": catalogue.padded(table["clicks"], candidates),
        "session_key": session_keys(ids),
        "session_id": ids,
    }


def columns(space: FeatureSpace, names: Iterable[str]) -> list[str]:
    """The columns that `examples` reads from a log whose sessions have the columns `names`."""
    lists_of_intents = [name for name in ("candidates", "candidate_set") if name in set(names)]
    return list(dict.fromkeys(["session_id", *space.columns, *lists_of_intents[:1], "shown", "clicks"]))


def column_names(uri: str) -> list[str]:
    """Columns of the sessions' files; dt and region, which stand in the folders' names, are not among them."""
    file = storage.list_files(storage.join(uri, "sessions"), ".parquet")[0]
    fs, path = storage.filesystem(file)
    return pq.read_schema(path, filesystem=fs).names
