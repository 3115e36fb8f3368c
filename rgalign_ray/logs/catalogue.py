"""The knowledge base of intents, and a session's candidates as indices into it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs import lists

INTENTS_FILE = "intents.parquet"
CANDIDATE_SETS_FILE = "candidate_sets.parquet"


class Catalogue:
    """Intents sorted by id; an intent's position in that order is its index everywhere."""

    def __init__(self, intents: pa.Table, candidate_sets: pa.Table | None = None) -> None:
        """
        Raises:
            DataError: when a candidate set names an intent that is not among `intents`.
        """
        self.intents = intents.sort_by("intent_id").combine_chunks()
        self.ids: list[str] = self.intents["intent_id"].to_pylist()
        self.titles: list[str] = self.intents["title"].to_pylist()
        self.categories: list[str] = self.intents["category"].to_pylist()
        self.index = {intent: position for position, intent in enumerate(self.ids)}
        self._ids = pa.array(self.ids, pa.string())
        self._set_names = pa.array([], pa.string())
        self._sets = np.empty((0, 0), dtype=np.int32)
        if candidate_sets is not None:
            self._set_names = lists.combined(pc.cast(candidate_sets["candidate_set"], pa.string()))
            self._sets = self._indices(candidate_sets["intents"], "candidate_sets")

    @classmethod
    def load(cls, uri: str) -> Catalogue:
        """The catalogue of a prepared or ingested log."""
        sets = storage.join(uri, CANDIDATE_SETS_FILE)
        return cls(
            storage.read_table(storage.join(uri, INTENTS_FILE)),
            storage.read_table(sets) if storage.exists(sets) else None,
        )

    @property
    def size(self) -> int:
        return len(self.ids)

    def candidates(self, table: pa.Table) -> np.ndarray:
        """int32 [B, C], indices of each session's candidates in the log's order, padded with -1.

        C is the longest list of the batch, or of all candidate sets where sessions name a set.

        Raises:
            DataError: for an intent or a candidate set that the catalogue does not have.
        """
        if "candidates" in table.column_names:
            return self._indices(table["candidates"], "candidates")
        names = pc.cast(table["candidate_set"], pa.string())
        position = pc.index_in(names, value_set=self._set_names)
        if position.null_count:
            unknown = names.filter(pc.is_null(position))[0]
            raise DataError(f"candidate_set: '{unknown}' is not one of the log's candidate sets.")
        return self._sets[position.to_numpy()]

    @staticmethod
    def padded(column: pa.ChunkedArray, like: np.ndarray) -> np.ndarray:
        """bool [B, C] of a list<bool> column parallel to `like`, the sessions' candidates; False where padded."""
        values = pc.fill_null(lists.flat(column), False).to_numpy(zero_copy_only=False)
        return lists.padded(lists.lengths(column), values, like.shape[1], False)

    def _indices(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        values = pc.cast(lists.flat(column), pa.string())
        found = pc.index_in(values, value_set=self._ids)
        if found.null_count:
            unknown = values.filter(pc.is_null(found))[0]
            raise DataError(f"{where}: intent '{unknown}' is not one of the catalogue's {self.size} intents.")
        counts = lists.lengths(column)
        width = int(counts.max(initial=0))
        return lists.padded(counts, found.to_numpy().astype(np.int32), width, -1)
