"""The feature space: fitted in one pass over a log, then a pure function from tables to integer arrays.

Every categorical and every bucketised numeric value is a row of one shared embedding table; so is every
value of a multi-valued field, in a second one, and every event of a history, in a third.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs import lists
from rgalign_ray.logs.feature_spec import FeatureSpec, FieldSpec

__all__ = ["FeatureSpace", "FeatureSpec", "FieldSpec"]

SAMPLE_ROWS = 50_000
"""Rows kept while fitting to estimate quantiles: the error of a quantile's rank is below 1 % of all rows."""

MISSING, UNKNOWN, FIRST = 0, 1, 2
"""Ids inside a field: no value, a value not in the vocabulary, the first known one. In lists `MISSING` is padding."""


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """Vocabularies and bucket edges of one log, with the spec and the history length they were fitted for."""

    spec: FeatureSpec
    history_length: int
    vocabularies: dict[str, list[str]]
    """Of each categorical and multi field, sorted."""
    edges: dict[str, list[float]]
    """Of each numeric field: bucket i holds the values in (edges[i-1], edges[i]]."""
    events: list[str]

    @classmethod
    def fit(cls, spec: FeatureSpec, batches: Iterable[pa.Table], history_length: int | None = None) -> FeatureSpace:
        """Fits in one pass; memory is bounded by the vocabularies and a sample of `SAMPLE_ROWS` rows.

        The result depends on the order of the rows, not on how they are cut into batches.

        Args:
            history_length: newest events of a history that are read; None: as many as the spec says.

        Raises:
            DataError: when a column of the spec is missing or of a wrong type, or there is no row.
        """
        fitting = _Fitting(spec)
        for batch in batches:
            fitting.add(batch)
        if not fitting.rows:
            raise DataError("features: there is no session to fit the feature space on.")
        return cls(
            spec=spec,
            history_length=spec.history_length(history_length),
            vocabularies={name: fitting.vocabulary(name) for name in fitting.counts if name != "history"},
            edges=fitting.edges(),
            events=fitting.vocabulary("history"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "history_length": self.history_length,
            "vocabularies": self.vocabularies,
            "edges": self.edges,
            "events": self.events,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FeatureSpace:
        """The space that `to_dict` wrote.

        Raises:
            DataError: when its vocabularies or buckets are not those of its spec.
        """
        space = cls(**{**data, "spec": FeatureSpec.model_validate(data["spec"])})
        numeric = {field.name for field in space.spec.of_kind("numeric")}
        others = {field.name for field in space.spec.fields} - numeric
        for what, found, wanted in (("vocabularies", space.vocabularies, others), ("buckets", space.edges, numeric)):
            if found.keys() != wanted:
                odd = ", ".join(sorted(found.keys() ^ wanted))
                raise DataError(
                    f"features: the {what} are of another spec (they differ in {odd}); fit them on this one."
                )
        return space

    @cached_property
    def version(self) -> str:
        """Hash of the content."""
        return storage.content_key(self.to_dict())

    @property
    def columns(self) -> list[str]:
        """The columns that `transform` reads."""
        return self.spec.columns

    @cached_property
    def _singles(self) -> list[FieldSpec]:
        return [field for field in self.spec.fields if field.kind != "multi"]

    @cached_property
    def _multis(self) -> list[FieldSpec]:
        return self.spec.of_kind("multi")

    @cached_property
    def _sizes(self) -> list[int]:
        """Ids of each single-valued field, those for missing and unknown included."""
        return [
            FIRST + (len(self.edges[f.name]) + 1 if f.kind == "numeric" else len(self.vocabularies[f.name]))
            for f in self._singles
        ]

    @property
    def single_fields(self) -> list[str]:
        """Names of the single-valued fields, in the order in which `transform` gives them."""
        return [field.name for field in self._singles]

    @property
    def num_fields(self) -> int:
        return len(self._singles)

    @property
    def field_size(self) -> int:
        """Rows of the embedding table of all single-valued fields."""
        return sum(self._sizes)

    @property
    def num_multi(self) -> int:
        return len(self._multis)

    @property
    def multi_size(self) -> int:
        """Rows of the embedding table of all multi-valued fields; rows 0 and 1 are padding and unknown."""
        return FIRST + sum(len(self.vocabularies[f.name]) for f in self._multis)

    @property
    def multi_length(self) -> int:
        return max((f.length for f in self._multis), default=0)

    @property
    def history_size(self) -> int:
        """Rows of the embedding table of events; rows 0 and 1 are padding and unknown."""
        return FIRST + len(self.events)

    def transform(self, table: pa.Table) -> dict[str, np.ndarray]:
        """The features of a table's sessions.

        Returns:
            fields: int32 [B, num_fields], rows of the table of `field_size`.
            multi: int32 [B, num_multi, multi_length], rows of the table of `multi_size`, 0 where padded.
            history: int32 [B, history_length], rows of the table of `history_size`, newest last, 0 where padded.

        Raises:
            DataError: when a column of the spec is missing or of a wrong type.
        """
        self.spec.check(table.schema, "features")
        singles = np.empty((self.num_fields, table.num_rows), np.int32)
        for kind, ids in (("categorical", self._categories), ("numeric", self._buckets)):
            places = [place for place, field in enumerate(self._singles) if field.kind == kind]
            singles[places] = ids(table, [self._singles[place].name for place in places])
        singles += np.cumsum([0, *self._sizes], dtype=np.int32)[:-1, None]  # each field's first row of the table
        return {"fields": np.ascontiguousarray(singles.T), "multi": self._multi(table), "history": self._history(table)}

    def _categories(self, table: pa.Table, names: list[str]) -> np.ndarray:
        """int64 [names, B]."""
        rows, ids = table.num_rows, np.empty((len(names), table.num_rows), np.int64)
        for own, values in _by_type(table, names):
            vocabularies = [self._vocabulary_arrays[names[column]] for column in own]
            ids[own] = _encode(_strings(values), *vocabularies).reshape(len(own), rows)
        return ids

    def _buckets(self, table: pa.Table, names: list[str]) -> np.ndarray:
        """int64 [names, B]."""
        values = _numbers(table, names)
        buckets = np.empty(values.shape, np.int64)
        for name, own, out in zip(names, values, buckets, strict=True):
            out[:] = self._edge_arrays[name].searchsorted(own, side="left")
        return np.where(np.isfinite(values), FIRST + buckets, MISSING)

    def _multi(self, table: pa.Table) -> np.ndarray:
        out = np.zeros((table.num_rows, self.num_multi, self.multi_length), dtype=np.int32)
        offset = 0
        for position, field in enumerate(self._multis):
            vocabulary = self._vocabulary_arrays[field.name]
            ids = _encode(_strings(lists.flat(table[field.name])), vocabulary)
            ids = np.where(ids >= FIRST, ids + offset, ids)
            counts = lists.lengths(table[field.name])
            out[:, position, : field.length] = lists.padded(counts, ids, field.length, MISSING)
            offset += len(vocabulary)
        return out

    def _history(self, table: pa.Table) -> np.ndarray:
        counts, events = lists.past_events(table)
        ids = _encode(_strings(pc.struct_field(events, "event")), self._vocabulary_arrays["history"])
        ids = np.where(ids == MISSING, UNKNOWN, ids)  # an event without a name is still an event
        from_newest = np.repeat(counts, counts) - lists.places(counts) - 1
        keep = from_newest < self.history_length
        out = np.zeros((table.num_rows, self.history_length), dtype=np.int32)
        out[lists.rows(counts)[keep], self.history_length - 1 - from_newest[keep]] = ids[keep]
        return out

    @cached_property
    def _vocabulary_arrays(self) -> dict[str, pa.Array]:
        return {name: pa.array(v, pa.string()) for name, v in {**self.vocabularies, "history": self.events}.items()}

    @cached_property
    def _edge_arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(edges, np.float64) for name, edges in self.edges.items()}


@dataclasses.dataclass
class _Fitting:
    """What one pass over the log gathers."""

    spec: FeatureSpec
    rows: int = 0
    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f.name for f in self.spec.fields if f.kind != "numeric"]
        self.counts = {name: Counter() for name in [*names, "history"]}
        self._numeric = [f.name for f in self.spec.of_kind("numeric")]
        self._random = np.random.default_rng(0)
        self._bound = np.inf
        """Rows with a greater priority cannot be among the smallest."""
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        """Priorities [b] and values [b, numeric fields] of the rows that may be."""

    def add(self, batch: pa.Table) -> None:
        self.spec.check(batch.schema, "features")
        self.rows += batch.num_rows
        for field in self.spec.of_kind("categorical"):
            self._count(field.name, _strings(batch[field.name]))
        for field in self.spec.of_kind("multi"):
            self._count(field.name, _strings(lists.flat(batch[field.name])))
        self._count("history", _strings(pc.struct_field(lists.past_events(batch)[1], "event")))
        self._keep(batch)

    def _count(self, name: str, values: pa.Array) -> None:
        for entry in pc.value_counts(values.drop_null()).to_pylist():
            self.counts[name][entry["values"]] += entry["counts"]

    def _keep(self, batch: pa.Table) -> None:
        """Bottom-k sampling: each row draws a number, and the rows with the smallest are kept.

        Rows gather until they are twice the sample: to cut it after every batch would copy it as often.
        """
        priority = self._random.random(batch.num_rows)
        chosen = np.flatnonzero(priority < self._bound)
        self._held.append((priority[chosen], _numbers(batch, self._numeric)[:, chosen].T))
        if sum(len(priority) for priority, _ in self._held) >= 2 * SAMPLE_ROWS:
            self._cut()

    def _cut(self) -> np.ndarray:
        """float64 [at most SAMPLE_ROWS, numeric fields], the sample; what is held besides is dropped."""
        priority, values = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        smallest = np.argsort(priority, kind="stable")[:SAMPLE_ROWS]
        self._held = [(priority[smallest], values[smallest])]
        if len(smallest) == SAMPLE_ROWS:
            self._bound = priority[smallest[-1]]
        return self._held[0][1]

    def vocabulary(self, name: str) -> list[str]:
        return sorted(value for value, count in self.counts[name].items() if count >= self.spec.min_count)

    def edges(self) -> dict[str, list[float]]:
        sample = self._cut()
        return {
            f.name: _edges(sample[:, position], f.buckets) for position, f in enumerate(self.spec.of_kind("numeric"))
        }


def _edges(values: np.ndarray, buckets: int) -> list[float]:
    """Upper edges of all buckets but the last: one bucket per value where values are few, else equal shares."""
    values = values[np.isfinite(values)]
    distinct = np.unique(values)
    if len(distinct) <= buckets:
        return distinct[:-1].tolist()
    shares = np.linspace(0, 1, buckets + 1)[1:-1]
    edges = np.unique(np.quantile(values, shares, method="inverted_cdf"))
    return edges[edges < distinct[-1]].tolist()


def _encode(values: pa.Array, *vocabularies: pa.Array) -> np.ndarray:
    """int64 ids of strings: `FIRST` + place in the vocabulary, `UNKNOWN`, or `MISSING` for null.

    With several vocabularies each is that of an equal part of the values.
    """
    size = len(values) // len(vocabularies)
    parts = [values.slice(number * size, size) for number in range(len(vocabularies))]
    places = pa.concat_arrays(
        [pc.index_in(part, value_set=own, skip_nulls=True) for part, own in zip(parts, vocabularies, strict=True)]
    )
    ids = pc.fill_null(places, UNKNOWN - FIRST).to_numpy(zero_copy_only=False).astype(np.int64) + FIRST
    if values.null_count:
        ids[pc.is_null(values).to_numpy(zero_copy_only=False)] = MISSING
    return ids


def _by_type(table: pa.Table, names: list[str]) -> Iterator[tuple[list[int], pa.ChunkedArray]]:
    """Columns of one type after another: which of the names they are, and their values one after another.

    What Arrow does with a column costs as much for one row as for a thousand, and a session that is served is one.
    """
    found: dict[pa.DataType, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(table[name].type, []).append(place)
    for of_type, places in found.items():
        chunks = [chunk for place in places for chunk in table[names[place]].chunks]
        yield places, pa.chunked_array(chunks, of_type)


def _numbers(table: pa.Table, names: list[str]) -> np.ndarray:
    """float64 [names, B], nan for null."""
    values = np.empty((len(names), table.num_rows))
    for own, column in _by_type(table, names):
        values[own] = _floats(column).reshape(len(own), table.num_rows)
    return values


def _strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return lists.combined(pc.cast(column, pa.string()))


def _floats(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """float64 values, nan for null. Booleans have no direct cast to floats in Arrow."""
    column = lists.combined(column)
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.int8())
    return pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy(zero_copy_only=False)
