"""Requests as rows of the very table that training read: the same columns, the same types, the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs import lists
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.schema import SESSIONS, is_list
from rgalign_ray.serve import api

GIVEN = ("region", "ts", "history")
"""Columns that a session has fields of its own for."""
Row = dict[str, Any]


class SessionError(Exception):
    """A request that names something wrongly."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class PromptError(SessionError):
    """A session that the prompt's template fails on."""


class SessionReader:
    """Makes rows of requests, and tables and session texts of rows.

    Args:
        sessions_uri: the artefact whose sessions the pair was trained on; its schema is the service's.
        spec: feature columns.
        template: of the prompt.
        history_length: newest events of a history that the pair was trained on.
    """

    def __init__(self, sessions_uri: str, spec: FeatureSpec, template: Template, history_length: int) -> None:
        self.template, self.history_length = template, history_length
        found = _schema(sessions_uri)
        names = dict.fromkeys([*spec.columns, *template.columns, *GIVEN])
        self.schema = pa.schema([(name, found.field(name).type) for name in names])
        self.features = [name for name in self.schema.names if name not in GIVEN]
        self._fits = {name: _fits(self.schema.field(name).type) for name in self.features}

    def row(self, session: api.Session, where: str = "session") -> Row:
        """The columns of one session: of its history the newest events before its entry, as ingest leaves them.

        Raises:
            SessionError: for a feature that is none, or that is of a wrong type, by the name of its field.
        """
        for name, value in session.features.items():
            place = f"{where}.features.{name}"
            if name not in self.features:
                raise SessionError(place, "no feature of this model; /v1/models lists them")
            kind = self.schema.field(name).type
            if isinstance(value, str) and is_list(kind):  # Arrow would take its letters for a list
                raise SessionError(place, f"must be of type {kind}")
        ts = session.ts or api.now()
        # a log of what was served is a log: one whose events lie after the entry would be set aside
        history = sorted((each for each in session.history if each.ts <= ts), key=lambda each: each.ts)
        events = [{"event": each.event, "text": each.text, "ts": each.ts} for each in history[-self.history_length :]]
        row: Row = dict.fromkeys(self.features) | session.features
        row |= {"region": session.region, "ts": ts, "history": events}
        if all(fits(row[name]) for name, fits in self._fits.items()):
            return row
        try:
            self.table([row])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            for name in self.features:
                field = self.schema.field(name)
                try:
                    pa.array([row[name]], field.type)
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                    raise SessionError(f"{where}.features.{name}", f"must be of type {field.type}") from None
            raise
        return row

    def session(self, row: Mapping[str, Any]) -> api.Session:
        """What the client of a log's session would send."""
        return api.Session(
            **{name: row[name] for name in ("user_id", "region", "ts")},
            history=row["history"] or [],
            features={name: row[name] for name in self.features if row[name] is not None},
        )

    def table(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist(list(rows), schema=self.schema)

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the reasoner reads of each."""
        return self.template.sessions(self.table(rows))

    def text(self, row: Mapping[str, Any], where: str = "session") -> str:
        """What the reasoner reads of one session.

        Raises:
            PromptError: where the template fails on it, as it may on nulls and on an empty history.
        """
        try:
            (text,) = self.texts([row])
        except DataError as error:
            raise PromptError(where, str(error)) from None
        return text

    def texts_of(self, log: pa.Table) -> list[str]:
        """The same of sessions of a log, whose histories may be longer."""
        if "history" in log.column_names:
            history, _ = lists.newest_events(log, self.history_length)
            log = log.set_column(log.column_names.index("history"), "history", history)
        return self.template.sessions(log)


def _fits(kind: pa.DataType) -> Callable[[Any], bool]:
    """Whether a value is surely of a type; of others Arrow decides, which takes milliseconds."""
    if is_list(kind):
        of_one = _fits(kind.value_type)
        return lambda value: value is None or (isinstance(value, list) and all(map(of_one, value)))
    if pa.types.is_boolean(kind):
        return lambda value: value is None or isinstance(value, bool)
    if pa.types.is_floating(kind):
        return lambda value: value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**24)
    if pa.types.is_signed_integer(kind):
        most = 2 ** (kind.bit_width - 1)
        return lambda value: value is None or (type(value) is int and -most <= value < most)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return lambda value: value is None or isinstance(value, str)
    return lambda value: value is None


def _schema(sessions_uri: str) -> pa.Schema:
    """Of the sessions' files, with the partition columns that stand in their folders' names."""
    file = storage.list_files(storage.join(sessions_uri, "sessions"), ".parquet")[0]
    fs, path = storage.filesystem(file)
    found = pq.read_schema(path, filesystem=fs)
    missing = [field for field in (SESSIONS.field("region"),) if found.get_field_index(field.name) < 0]
    return pa.schema([*found, *missing])
