"""The files that ingest reads, and every structural fault that they can have.

A structural fault stops the run with one line before anything is written; a fault of a single row
does not (see `faults`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rgalign_ray import schema, storage
from rgalign_ray.config import Log
from rgalign_ray.errors import DataError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.partitions import folders, wanted
from rgalign_ray.logs.roles import is_role

BATCH_ROWS = 8192

CANDIDATES = ("candidates", "candidate_set")
REPLACED = ("role", "dt")
"""Columns that ingest makes anew; see `refuse_foreign_roles`."""


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file of the sessions table."""

    uri: str
    name: str
    """Path relative to the source, as the quarantine names it."""
    rows: int
    schema: pa.Schema
    region: str | None
    """From the folder's name (region=XX), where the file has no such column."""

    def batches(self, columns: list[str], size: int = BATCH_ROWS) -> Iterator[pa.Table]:
        """The named columns in order of rows, at most `size` rows at a time; columns the file lacks are left out.

        Raises:
            DataError: when the file turns out to be damaged.
        """
        present = [name for name in columns if name in self.schema.names]
        with _parquet(self.uri) as parquet:
            many = self.rows > size  # threads cost more than they save on the small files of a partitioned log
            for batch in parquet.iter_batches(batch_size=size, columns=present, use_threads=many):
                table = pa.Table.from_batches([batch])
                if self.region is not None and "region" in columns:
                    table = table.append_column("region", pa.repeat(self.region, table.num_rows))
                yield table


def open_sessions(uri: str, spec: FeatureSpec, log: Log) -> list[SourceFile]:
    """The Parquet files of a sessions table in the order of their names, each with all columns it must have.

    Files in folders of other days or regions than `log` reads (dt=…, region=…) are not opened.

    Raises:
        DataError: when the folder is missing or holds no Parquet file, or none of these days and regions,
            when a file is empty, damaged or lacks a column, when files disagree on a column's type or on
            how sessions say their candidates, or when there is no row at all.
    """
    uris = session_uris(uri, log)
    if not uris:
        raise none_asked_for(uri, log)
    files = [_open(uri, each, spec) for each in uris]
    listing, naming = (next((f.uri for f in files if each in f.schema.names), None) for each in CANDIDATES)
    if listing and naming:
        raise DataError(
            f"{naming}: sessions name candidate sets, and those of {listing} list candidates; expected one way."
        )
    types: dict[str, tuple[pa.DataType, str]] = {}
    for file in files:
        for field in file.schema:
            known, where = types.setdefault(field.name, (field.type, file.uri))
            checked = field.name in schema.SESSIONS.names or field.name in schema.SESSIONS_OPTIONAL.names
            if not checked and _plain(known) != _plain(field.type):
                raise DataError(f"{file.uri}: column '{field.name}' is {field.type}; expected {known}, as in {where}.")
    if not any(file.rows for file in files):
        raise DataError(f"{uri}: the sessions table has no rows.")
    return files


def session_uris(uri: str, log: Log) -> list[str]:
    """The files of a sessions table that lie in folders of the days and regions that `log` reads.

    Raises:
        DataError: when the folder is missing or holds no Parquet file.
    """
    start, end = (None if bound is None else str(bound) for bound in (log.start, log.end))
    return [each for each in _file_uris(uri) if wanted(_name(uri, each), start, end, log.regions)]


def none_asked_for(uri: str, log: Log) -> DataError:
    """Of a log without a session of the days and regions that `log` reads."""
    asked = f"start {log.start}, end {log.end}, regions {log.regions}"
    return DataError(f"{uri}: no session has a day and region that log.* asks for ({asked}).")


def extra_columns(files: list[SourceFile]) -> pa.Schema:
    """Columns beyond those of `schema.SESSIONS` that some file has, sorted by name; they pass through ingest."""
    known = {*schema.SESSIONS.names, *REPLACED}
    found = {field.name: field for file in reversed(files) for field in file.schema if field.name not in known}
    optional = {field.name: field.type for field in schema.SESSIONS_OPTIONAL}
    return pa.schema([(name, optional.get(name, _plain(found[name].type))) for name in sorted(found)])


def refuse_foreign_roles(table: pa.Table, uri: str) -> None:
    """Raises `DataError` naming `uri` for a column `role` of the log's own, which ingest would write over.

    A log that was ingested before has our roles there, and gets new ones.
    """
    if schema.ROLE.name not in table.column_names:
        return
    for value in pc.unique(table[schema.ROLE.name]).to_pylist():
        if value is not None and not is_role(value):
            raise DataError(
                f"{uri}: column 'role' holds '{value}', no role of a run, and ingest writes its roles there; rename "
                "the column."
            )


def read_intents(uri: str) -> pa.Table:
    """The `intents` table, sorted by id; a description or category that is null becomes empty.

    Raises:
        DataError: when it is missing, damaged, without rows or a column, an id is empty or not unique, or a title is
            empty.
    """
    table = _read(uri, schema.INTENTS, "an intents table")
    ids = table["intent_id"]
    if not table.num_rows:
        raise DataError(f"{uri}: the knowledge base has no intents.")
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise DataError(f"{uri}: column 'intent_id' has an empty id; expected one of its own for each intent.")
    _refuse_repeated(ids, f"{uri}: column 'intent_id'")
    # an objective may train on titles, and the report prints them: a null would end a run in its last stage
    untitled = table.filter(pc.equal(pc.utf8_trim_whitespace(pc.fill_null(table["title"], "")), ""))
    if untitled.num_rows:
        intent = untitled["intent_id"][0].as_py()
        raise DataError(f"{uri}: column 'title' is empty for intent '{intent}'; expected a text for each intent.")
    for name in ("description", "category"):
        table = table.set_column(table.column_names.index(name), schema.INTENTS.field(name), table[name].fill_null(""))
    return table.sort_by("intent_id")


def read_candidate_sets(uri: str, intents: pa.Table) -> pa.Table:
    """The `candidate_sets` table, sorted by name.

    Raises:
        DataError: as `read_intents`, and when a set names an intent that is not among `intents`, or one twice.
    """
    table = _read(uri, schema.CANDIDATE_SETS, "a candidate_sets table")
    _refuse_repeated(table["candidate_set"], f"{uri}: column 'candidate_set'")
    known = set(intents["intent_id"].to_pylist())
    for name, members in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
        where = f"{uri}: candidate set '{name}'"
        if unknown := [intent for intent in members or [] if intent not in known]:
            raise DataError(f"{where} names intent '{unknown[0]}', which the knowledge base does not have.")
        _refuse_repeated(pa.array(members or [], pa.string()), where)
    return table.sort_by("candidate_set")


def _file_uris(uri: str) -> list[str]:
    fs, path = storage.filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise DataError(f"{uri}: no such folder; expected Parquet files of sessions.")
    if kind == pafs.FileType.File:
        return [uri]
    files = storage.list_files(uri, ".parquet")
    if not files:
        raise DataError(f"{uri}: the folder holds no Parquet file; expected sessions in dt=…/region=…/*.parquet.")
    return files


def _name(source: str, uri: str) -> str:
    """Path of a file inside its source, which may be that file."""
    place = storage.pure_path(uri)
    return str(place.relative_to(place.parent if uri == source else storage.pure_path(source)))


def _open(source: str, uri: str, spec: FeatureSpec) -> SourceFile:
    with _parquet(uri) as parquet:
        found, rows = parquet.schema_arrow, parquet.metadata.num_rows
    name = _name(source, uri)
    region = None if "region" in found.names else folders(name).get("region")
    required = [field for field in schema.SESSIONS if field.name != "region" or region is None]
    optional = [field for field in schema.SESSIONS_OPTIONAL if field.name in found.names]
    schema.check(found, pa.schema([*required, *optional]), uri, extra=True)
    candidates = [column for column in CANDIDATES if column in found.names]
    if len(candidates) != 1:
        have = "both are there" if candidates else "both are missing"
        raise DataError(f"{uri}: expected one of the columns 'candidates' and 'candidate_set'; {have}.")
    spec.check(found if region is None else found.append(schema.SESSIONS.field("region")), uri)
    return SourceFile(uri, name, rows, found, region)


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; what goes wrong while it is read is a `DataError` that names it."""
    fs, path = storage.filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{uri}: no such file.")
    if info.size == 0:
        raise DataError(f"{uri}: the file is empty (0 bytes); expected Parquet.")
    try:
        with fs.open_input_file(path) as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: not a whole Parquet file ({' '.join(str(error).split())}).") from None


def _read(uri: str, expected: pa.Schema, what: str) -> pa.Table:
    with _parquet(uri) as parquet:
        schema.check(parquet.schema_arrow, expected, f"{uri}: {what}", extra=True)
        return parquet.read(columns=expected.names).select(expected.names).cast(expected)


def _refuse_repeated(ids: pa.ChunkedArray | pa.Array, where: str) -> None:
    for entry in pc.value_counts(ids).to_pylist():
        if entry["counts"] > 1:
            raise DataError(f"{where} has '{entry['values']}' {entry['counts']} times; expected each once.")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
