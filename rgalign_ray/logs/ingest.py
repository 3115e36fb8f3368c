"""From any log in our schema to the sessions that a run reads: validated, with roles, by day and region.

    source files ──structure──▶ first pass: ids, days, regions ──▶ second pass, batch by batch:
                   (stops)      which rows, last day, repeats       faults ──▶ quarantine.parquet
                                                                    the rest ──role, cold──▶ sessions/dt=…/region=…/

Memory is bounded by one batch, the writer's buffer, and ten bytes per row of the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rgalign_ray import progress, schema, storage
from rgalign_ray.config import Log, Roles
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import hashes
from rgalign_ray.logs import cold, lists, source
from rgalign_ray.logs.catalogue import CANDIDATE_SETS_FILE, INTENTS_FILE
from rgalign_ray.logs.faults import Examination, Examiner
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.partitions import PartitionWriter
from rgalign_ray.logs.roles import role_of

__all__ = ["QUARANTINE_FILE", "Summary", "ingest", "role_of"]

QUARANTINE_FILE = "quarantine.parquet"
LEAST_GAP = 7
"""Days from the last day but one to the last that are never told of: a log may be written once a week."""


@dataclass
class Summary:
    """What became of every row of the files that were opened: rows = outside + quarantined + kept."""

    files: int = 0
    rows: int = 0
    outside: int = 0
    """Rows of other days or regions than the configuration reads, in files that were opened."""
    kept: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason (`faults.REASONS`)."""
    roles: Counter[str] = field(default_factory=Counter)
    """Kept rows by role, those of role `none`, which no stage reads, included."""
    clicked: Counter[str] = field(default_factory=Counter)
    """Sessions with a click, by role."""
    without_click: int = 0
    """Kept rows without a click; they are part of the log."""
    cold_intents: int = 0
    """Intents that test sessions alone have (`roles.cold_share`)."""
    history_capped: int = 0
    """Kept rows whose history was cut to its newest events (`log.history_length`, else the feature spec's length)."""
    first_day: str = ""
    last_day: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("roles", "clicked")}
        return {**asdict(self), "quarantined": dict(self.quarantined), **counts}


def ingest(
    source_uri: str,
    intents_uri: str,
    candidate_sets_uri: str | None,
    out_uri: str,
    roles: Roles,
    rounds: int,
    *,
    log: Log,
    feature_columns: FeatureSpec,
    on_rows: Callable[[int], None] | None = None,
) -> Summary:
    """Writes sessions, intents, candidate_sets and the quarantine of a run under `out_uri`.

    Args:
        source_uri: folder of Parquet files of the `sessions` table, or one such file.
        intents_uri, candidate_sets_uri: Parquet files; None where sessions list their candidates.
        log: which days and regions are read, and how many events of a history are kept.
        feature_columns: columns that every file must have, with their kinds.
        on_rows: called with the number of rows of each batch that was read.

    Raises:
        DataError: for a structural fault, when cold intents are asked for but sessions name candidate sets,
            and when no row is left.
    """
    files = source.open_sessions(source_uri, feature_columns, log)
    extra = source.extra_columns(files)
    intents = source.read_intents(intents_uri)
    candidate_sets = source.read_candidate_sets(candidate_sets_uri, intents) if candidate_sets_uri else None
    held_back = _cold(files, intents, roles, source_uri)
    chosen = _choose(files, log, source_uri)
    examiner = Examiner(intents, candidate_sets, feature_columns)
    summary = Summary(files=len(files), rows=len(chosen.inside), outside=int((~chosen.inside).sum()))
    history_length = feature_columns.history_length(log.history_length)
    summary.cold_intents = len(held_back)
    summary.first_day, summary.last_day = str(chosen.first_day), str(chosen.last_day)
    _tell_of_a_lone_last_day(chosen.days, roles.test_days)
    writer = PartitionWriter(storage.join(out_uri, "sessions"))
    with _Quarantine(storage.join(out_uri, QUARANTINE_FILE)) as quarantine:
        for start, table in _batches(files, [*schema.SESSIONS.names, *extra.names]):
            if on_rows:
                on_rows(table.num_rows)
            rows = start + np.flatnonzero(chosen.inside[start : start + table.num_rows])
            table = table.take(pa.array(rows - start))
            found = examiner.examine(table, chosen.repeated[rows])
            quarantine.add(table, found, *chosen.origin(rows))
            sound = table.filter(pa.array(found.reason == ""))
            ts = lists.microseconds(sound["ts"]).astype("datetime64[us]")
            role = role_of(sound["user_id"].to_pylist(), ts, roles, rounds, chosen.last_day)
            if len(held_back):
                sound, role = cold.withhold(sound, role, held_back)
            sound = _finished(sound, extra, history_length, summary)
            sound = sound.append_column(schema.ROLE, pa.array(role, pa.string()))
            summary.roles.update(role.tolist())
            summary.clicked.update(role[lists.any_true(sound["clicks"])].tolist())
            summary.kept += sound.num_rows
            writer.write(sound)
        writer.close()
        summary.quarantined = quarantine.counts
        if not summary.kept:
            reason, count = quarantine.counts.most_common(1)[0]
            raise DataError(f"{source_uri}: no sound session is left; {count} of {summary.rows} rows have '{reason}'.")
    storage.write_table(storage.join(out_uri, INTENTS_FILE), intents)
    if candidate_sets is not None:
        storage.write_table(storage.join(out_uri, CANDIDATE_SETS_FILE), candidate_sets)
    return summary


def _cold(files: list[source.SourceFile], intents: pa.Table, roles: Roles, source_uri: str) -> pa.Array:
    """The ids of the cold intents; none unless `roles.cold_share` asks for them."""
    if roles.cold_share and any("candidates" not in file.schema.names for file in files):
        raise DataError(
            f"{source_uri}: sessions name candidate sets; roles.cold_share needs a list of candidates in each session."
        )
    return cold.cold_intents(intents["intent_id"].to_pylist(), roles)


@dataclass(frozen=True)
class _Chosen:
    """What the first pass finds out about each row, files one after another."""

    files: np.ndarray
    """str [F], the files' names."""
    starts: np.ndarray
    """int64 [F], the number of each file's first row in the whole log."""
    inside: np.ndarray
    """bool [N], of the days and regions that are read; rows without a day or region count as inside."""
    repeated: np.ndarray
    """bool [N], an earlier row inside has the same session id."""
    days: np.ndarray
    """datetime64[D] [D], the days that rows inside have, in order."""

    @property
    def first_day(self) -> np.datetime64:
        return self.days[0]

    @property
    def last_day(self) -> np.datetime64:
        return self.days[-1]

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The file of each row of the log, and its number there."""
        file = np.searchsorted(self.starts, rows, side="right") - 1
        return self.files[file], rows - self.starts[file]


def _choose(files: list[source.SourceFile], log: Log, source_uri: str) -> _Chosen:
    ids, days, regions = [], [], []
    for file in files:
        for table in file.batches(["session_id", "ts", "region", schema.ROLE.name]):
            source.refuse_foreign_roles(table, file.uri)
            ids.append(_hashes(table["session_id"]))
            days.append(lists.microseconds(table["ts"]) // 86_400_000_000)
            wanted = pa.array(log.regions or [], pa.string())
            region = pc.cast(table["region"], pa.string())
            known = pc.or_kleene(pc.is_null(region), pc.is_in(region, value_set=wanted))
            regions.append(lists.combined(known).to_numpy(zero_copy_only=False) | (log.regions is None))
    day = np.concatenate(days).astype("datetime64[D]")
    timeless = np.concatenate(days) == lists.MISSING_TIME // 86_400_000_000
    inside = np.concatenate(regions)
    if log.start:
        inside &= timeless | (day >= np.datetime64(log.start))
    if log.end:
        inside &= timeless | (day <= np.datetime64(log.end))
    if not (inside & ~timeless).any():
        raise source.none_asked_for(source_uri, log)
    repeated = _repeated(np.concatenate(ids), inside)
    names, sizes = np.array([file.name for file in files]), np.array([file.rows for file in files])
    return _Chosen(names, np.cumsum(sizes) - sizes, inside, repeated, np.unique(day[inside & ~timeless]))


def _tell_of_a_lone_last_day(days: np.ndarray, test_days: int) -> None:
    """Notes a last day that lies far beyond all others: a single wrong time moves the test period to itself."""
    if not test_days or len(days) < 2:
        return
    gap = int((days[-1] - days[-2]).astype(int))
    if gap > max(test_days, LEAST_GAP):
        progress.note(
            f"the log's last day, {days[-1]}, is {gap:,} days after {days[-2]}, the day before it with sessions; the "
            f"test period is the {test_days} days up to the last. If its times are wrong, cut them: log.end={days[-2]}"
        )


def _hashes(ids: pa.ChunkedArray) -> np.ndarray:
    """uint64 [B], a hash of each id; 0 for null and for an empty one."""
    return np.where(
        pc.fill_null(pc.equal(ids, ""), True).to_numpy(), np.uint64(0), hashes(i or "" for i in ids.to_pylist())
    )


def _repeated(ids: np.ndarray, inside: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(inside & (ids != 0))
    _, first = np.unique(ids[rows], return_index=True)
    repeated = np.zeros(len(ids), dtype=bool)
    repeated[rows] = True
    repeated[rows[first]] = False
    return repeated


def _batches(files: list[source.SourceFile], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Tables of about `BATCH_ROWS` rows with the number of their first row in the log.

    Small files of one schema are put together: a log has many of them, and each table costs the same.
    """
    start = 0
    held: list[pa.Table] = []
    for file in files:
        for table in file.batches(columns):
            full = sum(part.num_rows for part in held) + table.num_rows > source.BATCH_ROWS
            if held and (full or held[0].schema != table.schema):
                yield start, pa.concat_tables(held)
                start += sum(part.num_rows for part in held)
                held = []
            held.append(table)
    if held:
        yield start, pa.concat_tables(held)


def _finished(table: pa.Table, extra: pa.Schema, history_length: int, summary: Summary) -> pa.Table:
    """The rows in the written schema: history oldest first and capped, columns that the file lacks as nulls."""
    history, counts = lists.newest_events(table, history_length)
    summary.history_capped += int((counts > history_length).sum())
    columns: dict[str, pa.Array] = {"history": history}
    summary.without_click += int((~lists.any_true(table["clicks"])).sum())
    target = pa.schema([*schema.SESSIONS, *extra])
    for name, kind in zip(target.names, target.types, strict=True):
        if name in table.column_names and name not in columns:
            columns[name] = pc.cast(table[name], kind, safe=False)
    absent = {name: pa.nulls(table.num_rows, target.field(name).type) for name in target.names if name not in columns}
    return pa.table({**columns, **absent}).select(target.names).cast(target)


class _Quarantine:
    """The rows that were set aside, written as they come."""

    def __init__(self, uri: str) -> None:
        self.counts: Counter[str] = Counter()
        fs, path = storage.filesystem(uri)
        fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        self._writer = pq.ParquetWriter(path, schema.QUARANTINE, filesystem=fs, compression="zstd")

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, table: pa.Table, found: Examination, files: np.ndarray, rows: np.ndarray) -> None:
        """Adds the rows of a batch that have a reason; `files` and `rows` say where they stand."""
        bad = np.flatnonzero(found.reason != "")
        if not len(bad):
            return
        self.counts.update(found.reason[bad].tolist())
        aside = {
            "session_id": pc.cast(table["session_id"].take(pa.array(bad)), pa.string()),
            "file": pa.array(files[bad].tolist()),
            "row": pa.array(rows[bad]),
            "reason": pa.array(found.reason[bad].tolist()),
            "detail": pa.array([found.detail[int(row)] for row in bad]),
        }
        self._writer.write_table(pa.table(aside, schema=schema.QUARANTINE))
