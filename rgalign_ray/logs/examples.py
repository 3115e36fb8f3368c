"""Sessions as the arrays that rankers read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import storage
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


def session_keys(ids: list[str]) -> np.ndarray:
    """int64 [B], non-negative 63-bit hashes of session ids."""
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def uniform(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """float64 [n] in [0, 1), a hash of (seed, purpose, key): the same wherever a session is held."""
    return (mixed(keys, seed, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixed(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """uint64 [n], a hash of (seed, purpose, key): splitmix64's finaliser (Steele et al. 2014) over key and salt."""
    salt = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) ^ salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def column_names(uri: str) -> list[str]:
    """Columns of the sessions' files; dt and region, which stand in the folders' names, are not among them."""
    file = storage.list_files(storage.join(uri, "sessions"), ".parquet")[0]
    fs, path = storage.filesystem(file)
    return pq.read_schema(path, filesystem=fs).names
