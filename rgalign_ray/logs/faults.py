"""Faults of single rows: each has a fixed reason word, and a row with one goes to the quarantine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray.logs import lists
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.partitions import fits

REASONS = {
    "null_id": "session_id or user_id is null or empty",
    "null_time": "ts is null",
    "null_region": "region is null or empty",
    "region_name": "region is too long for a folder's name, or stands for null there",
    "duplicate_session": "an earlier row has the same session_id",
    "no_candidates": "there is nothing to rank",
    "unknown_candidate_set": "candidate_set names no candidate set",
    "unknown_intent": "a candidate is not in the knowledge base",
    "duplicate_candidate": "an intent is a candidate twice",
    "shown_length": "shown is not as long as the candidates",
    "clicks_length": "clicks is not as long as the candidates",
    "other_length": "position, propensity or resolved is not as long as the candidates",
    "position_range": "a position does not fit 16 bits",
    "null_label": "shown or clicks holds a null",
    "click_not_shown": "a click on a candidate that was not shown",
    "non_finite_feature": "a numeric feature is infinite or not a number",
    "event_without_time": "an event of the history has no ts",
    "event_after_entry": "an event of the history lies after ts",
}
"""Every reason, in the order in which rows are examined; a row is set aside for its first."""

Detail = Callable[[int], str]


class Examination:
    """The faults of one batch: `reason` is '' for a sound row."""

    def __init__(self, rows: int) -> None:
        self.reason = np.full(rows, "", dtype="U24")
        self.detail: dict[int, str] = {}

    def mark(self, reason: str, rows: np.ndarray, detail: Detail) -> None:
        """Marks the rows of a bool mask that have no reason yet."""
        for row in np.flatnonzero(rows & (self.reason == "")):
            self.reason[row] = reason
            self.detail[int(row)] = detail(int(row))


class Examiner:
    """Examines batches of sessions against one knowledge base and feature spec."""

    def __init__(self, intents: pa.Table, candidate_sets: pa.Table | None, spec: FeatureSpec) -> None:
        self._intents = lists.combined(intents["intent_id"])
        self._numeric = [field.name for field in spec.of_kind("numeric")]
        self._set_names, self._set_sizes = pa.array([], pa.string()), np.empty(0, dtype=np.int64)
        if candidate_sets is not None:
            self._set_names = lists.combined(candidate_sets["candidate_set"])
            self._set_sizes = lists.lengths(candidate_sets["intents"])

    def examine(self, table: pa.Table, duplicate: np.ndarray) -> Examination:
        """The faults of a batch; `duplicate` marks rows whose session id stands in an earlier row."""
        found = Examination(table.num_rows)
        ids = table["session_id"].to_pylist()
        found.mark("null_id", _empty(table["session_id"]) | _empty(table["user_id"]), _constant(""))
        found.mark("null_time", _null(table["ts"]), _constant(""))
        found.mark("null_region", _empty(table["region"]), _constant(""))
        regions = pc.cast(table["region"], pa.string())
        odd = [region for region in pc.unique(regions).to_pylist() if region and not fits(region)]
        unfit = lists.combined(pc.is_in(regions, value_set=pa.array(odd, pa.string())))
        found.mark("region_name", unfit.to_numpy(zero_copy_only=False), lambda row: f"region {str(regions[row])[:20]}…")
        found.mark("duplicate_session", duplicate, lambda row: f"session_id {ids[row]}")
        counts = self._candidates(table, found)
        self._labels(table, counts, found)
        self._features(table, found)
        _history(table, found)
        return found

    def _candidates(self, table: pa.Table, found: Examination) -> np.ndarray:
        """Marks faults of the candidates and returns their number per row, int64 [B]."""
        if "candidate_set" in table.column_names:
            names = table["candidate_set"]
            found.mark("no_candidates", _null(names), lambda row: "candidate_set is null")
            position = pc.index_in(pc.cast(names, pa.string()), value_set=self._set_names)
            found.mark("unknown_candidate_set", _null(position), lambda row: f"candidate_set {names[row]}")
            sizes = np.append(self._set_sizes, 0)
            counts = sizes[pc.fill_null(position, -1).to_numpy()]
            found.mark("no_candidates", counts == 0, lambda row: f"candidate_set {names[row]} is empty")
            return counts
        counts = lists.lengths(table["candidates"])
        found.mark("no_candidates", counts == 0, _constant(""))
        intents = pc.cast(lists.flat(table["candidates"]), pa.string())
        index = pc.index_in(intents, value_set=self._intents)
        row_of, unknown = lists.rows(counts), np.flatnonzero(_null(index))
        first = dict(zip(row_of[unknown][::-1].tolist(), unknown[::-1].tolist(), strict=True))
        found.mark("unknown_intent", _any(row_of[unknown], counts), lambda row: f"intent {intents[first[row]]}")
        known, size = np.flatnonzero(~_null(index)), len(self._intents)
        places = np.sort(row_of[known] * size + index.drop_null().to_numpy())
        repeated = places[1:][places[1:] == places[:-1]]
        twice = dict(zip((repeated // size).tolist(), (repeated % size).tolist(), strict=True))
        is_twice = _any(repeated // size, counts)
        found.mark("duplicate_candidate", is_twice, lambda row: f"intent {self._intents[twice[row]]}")
        return counts

    def _labels(self, table: pa.Table, counts: np.ndarray, found: Examination) -> None:
        reasons = {"shown": "shown_length", "clicks": "clicks_length"}
        for name in ("shown", "clicks", "position", "propensity", "resolved"):
            if name not in table.column_names:
                continue
            long, given = lists.lengths(table[name]), ~_null(table[name])
            wrong = (long != counts) & (given | (name in reasons))  # an optional list may be absent
            found.mark(reasons.get(name, "other_length"), wrong, _lengths_detail(name, long, counts))
        if "position" in table.column_names:
            position = pc.cast(lists.flat(table["position"]), pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
            row_of = lists.rows(lists.lengths(table["position"]))
            large = np.abs(position) > np.iinfo(np.int16).max
            found.mark("position_range", _any(row_of[large], counts), _constant(""))
        for name in reasons:
            null = _null(lists.flat(table[name]))
            row_of = lists.rows(lists.lengths(table[name]))
            found.mark("null_label", _any(row_of[null], counts), _constant(name))
        parallel = np.all([lists.lengths(table[name]) == counts for name in reasons], axis=0)
        shown, clicks = (_flags(table[name], parallel) for name in reasons)
        unseen, own = np.flatnonzero(clicks & ~shown), np.where(parallel, counts, 0)
        row_of, place = lists.rows(own)[unseen], lists.places(own)[unseen]
        first = dict(zip(row_of[::-1].tolist(), place[::-1].tolist(), strict=True))
        found.mark("click_not_shown", _any(row_of, counts), lambda row: f"candidate {first[row]} (from 0)")

    def _features(self, table: pa.Table, found: Examination) -> None:
        for name in self._numeric:
            column = lists.combined(table[name])
            if pa.types.is_floating(column.type):
                finite = pc.fill_null(pc.is_finite(column), True).to_numpy(zero_copy_only=False)
                found.mark("non_finite_feature", ~finite, _value(name, column))


def _history(table: pa.Table, found: Examination) -> None:
    counts = lists.lengths(table["history"])
    row_of = lists.rows(counts)
    times = lists.microseconds(pc.struct_field(lists.flat(table["history"]), "ts"))
    timeless = _any(row_of[times == lists.MISSING_TIME], counts)
    found.mark("event_without_time", timeless, _constant(""))
    late = times > lists.microseconds(table["ts"])[row_of]
    late_events = np.bincount(row_of[late], minlength=len(counts))
    found.mark("event_after_entry", late_events > 0, lambda row: f"{late_events[row]} of {counts[row]} events")


def _any(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """bool [B], which rows are named."""
    return np.bincount(rows, minlength=len(like)) > 0


def _constant(detail: str) -> Detail:
    return lambda row: detail


def _value(name: str, column: pa.Array) -> Detail:
    return lambda row: f"{name} is {column[row]}"


def _lengths_detail(name: str, long: np.ndarray, counts: np.ndarray) -> Detail:
    return lambda row: f"{name} {long[row]}, candidates {counts[row]}"


def _flags(column: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """The flags of the rows of a bool mask, one after another; null is false."""
    return pc.fill_null(lists.flat(column.filter(pa.array(rows))), False).to_numpy(zero_copy_only=False)


def _null(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return lists.combined(pc.is_null(column)).to_numpy(zero_copy_only=False)


def _empty(column: pa.ChunkedArray) -> np.ndarray:
    """Null or the empty string."""
    return lists.combined(pc.fill_null(pc.equal(pc.cast(column, pa.string()), ""), True)).to_numpy(zero_copy_only=False)
