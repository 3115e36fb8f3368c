"""An artefact of embeddings in memory, looked up by session or intent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import session_keys

Readout = Literal["prompt", "query", "item"]
Vectors = tuple[np.ndarray, np.ndarray]
"""Keys, int64 [n], ascending and unique, and their vectors, float16 [n, D]."""


@dataclass(frozen=True)
class Embeddings:
    """Vectors of one reasoner version by readout; an id may lack some of them.

    Ids are held as their 63-bit hashes (`session_keys`), which cost 8 bytes each and sort fast.
    """

    reasoner_version: str
    dim: int
    readouts: dict[str, Vectors]

    @classmethod
    def load(cls, *uris: str) -> Embeddings:
        """Reads every Parquet file of embeddings artefacts; of several samples of an id, the first counts.

        Raises:
            DataError: when there is no such table, it has other columns, or mixes reasoner versions.
        """
        files = {uri: storage.list_files(uri, ".parquet") for uri in uris}
        for uri in uris:
            if not files[uri]:
                raise DataError(f"{uri}: no embeddings here; run the encode stage first.")
        return cls.of(pa.concat_tables([_read(file) for uri in uris for file in files[uri]]), uris[0])

    @classmethod
    def of(cls, table: pa.Table, where: str = "embeddings") -> Embeddings:
        """The embeddings of a table of `schema.embeddings`; `where` names it in errors."""
        kind = table.schema.field("embedding").type if "embedding" in table.column_names else None
        if kind is None or not pa.types.is_fixed_size_list(kind):
            raise DataError(f"{where}: column 'embedding' must be a fixed-size list of float16.")
        schema.check(table.schema, schema.embeddings(kind.list_size), where)
        versions = sorted(set(table["reasoner_version"].unique().to_pylist()))
        if len(versions) != 1:
            raise DataError(f"{where}: embeddings of one reasoner version expected, found {versions}.")
        table = table.combine_chunks()
        readout = np.asarray(table["readout"].to_pylist())
        keys = session_keys(table["id"].to_pylist())
        sample = table["sample"].to_numpy()
        vectors = matrix(table["embedding"], kind.list_size)
        readouts = {name: _first(keys, sample, vectors, readout == name) for name in sorted(set(readout.tolist()))}
        return cls(versions[0], kind.list_size, readouts)

    def lookup(self, keys: np.ndarray, readout: Readout) -> tuple[np.ndarray, np.ndarray]:
        """float16 [B, D], zeros where an id has no such vector, and bool [B], where it has one."""
        known, vectors = self.readouts.get(readout, (np.empty(0, np.int64), np.empty((0, self.dim), np.float16)))
        if not len(known):
            return np.zeros((len(keys), self.dim), np.float16), np.zeros(len(keys), bool)
        place = np.searchsorted(known, keys).clip(max=len(known) - 1)
        found = known[place] == keys
        return np.where(found[:, None], vectors[place], np.float16(0)), found

    def items(self, intent_ids: list[str]) -> np.ndarray:
        """float16 [I, D], the text embeddings of all intents.

        Raises:
            DataError: when an intent has none.
        """
        vectors, found = self.lookup(session_keys(intent_ids), "item")
        if not found.all():
            raise DataError(f"item embeddings: intent '{intent_ids[int(np.argmin(found))]}' has none; encode it.")
        return vectors

    def moved_to(self, other: Embeddings) -> Embeddings:
        """The control: every e(x) moved by one vector, the mean way from here to `other` over ids that both have."""
        known, vectors = self.readouts["prompt"]
        there, found = other.lookup(known, "prompt")
        way = (there[found].astype(np.float32) - vectors[found]).mean(axis=0)
        moved = (vectors + way).astype(np.float16)
        return Embeddings(other.reasoner_version, self.dim, {"prompt": (known, moved)})

    def shuffled(self, session_ids: list[str], user_ids: list[str], seed: int) -> Embeddings:
        """The control: each session gets the vectors of a session of another user, by a permutation.

        Users are put in an order drawn by `seed`, their sessions one after another, and all vectors move
        half a round. Sessions not named, or without e(x), are left out: the control reads as many as the row itself.

        Raises:
            DataError: when one user has more than half of the sessions.
        """
        salt = f"{seed}/"
        _, there = self.lookup(session_keys(session_ids), "prompt")
        session_ids, user_ids = (list(compress(ids, there)) for ids in (session_ids, user_ids))
        user_keys = session_keys([salt + user for user in user_ids])
        keys = session_keys(session_ids)
        order = np.lexsort((session_keys([salt + i for i in session_ids]), user_keys))
        partner = np.roll(order, len(order) // 2)
        if (user_keys[order] == user_keys[partner]).any():
            raise DataError("shuffled queries: one user has more than half of the sessions; use a log of more users.")
        given = np.sort(keys[order])
        source = keys[partner][np.argsort(keys[order])]
        readouts = {}
        for name in self.readouts:
            vectors, found = self.lookup(source, name)  # type: ignore[arg-type]
            readouts[name] = (given[found], vectors[found])
        return Embeddings(self.reasoner_version, self.dim, readouts)


def _read(uri: str) -> pa.Table:
    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        return pq.read_table(file)


def matrix(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """float16 [rows, dim], a column of vectors of one length."""
    flat = column.combine_chunks().flatten() if isinstance(column, pa.ChunkedArray) else column.flatten()
    return flat.to_numpy(zero_copy_only=False).astype(np.float16, copy=False).reshape(-1, dim)


def _first(keys: np.ndarray, sample: np.ndarray, vectors: np.ndarray, chosen: np.ndarray) -> Vectors:
    keys, sample, vectors = keys[chosen], sample[chosen], vectors[chosen]
    order = np.lexsort((sample, keys))
    unique, first = np.unique(keys[order], return_index=True)
    return unique, vectors[order][first]
