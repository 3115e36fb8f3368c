"""Vectors kept for users: e(x) of their last known situation, read ahead of their visit and looked up in a file.

A folder holds, for every version of the reasoner, a file that `rgalign read-ahead` writes and swaps whole, and beside
it one of what has happened since (`POST /v1/refresh`). Both are SQLite: the first is read through a memory map and
without locks, the second by all gateways of a machine at once. What is newer counts. One more file, of all versions,
says whom to forget, and since when.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np

from rgalign_ray.errors import DataError

TABLE = """CREATE TABLE IF NOT EXISTS vectors (
    user_id TEXT PRIMARY KEY, ts REAL NOT NULL, vector BLOB NOT NULL, query TEXT
) WITHOUT ROWID"""
FORGOTTEN_TABLE = """CREATE TABLE IF NOT EXISTS forgotten.users (
    user_id TEXT PRIMARY KEY, ts REAL NOT NULL
) WITHOUT ROWID"""
PUT = """INSERT INTO vectors SELECT ?1, ?2, ?3, ?4
    WHERE NOT EXISTS (SELECT 1 FROM forgotten.users WHERE user_id = ?1 AND ts >= ?2)
    ON CONFLICT (user_id) DO UPDATE
    SET ts = excluded.ts, vector = excluded.vector, query = excluded.query WHERE excluded.ts >= vectors.ts"""
MAPPED_BYTES = 1 << 40
"""As much of the file as there is: pages are read as they are asked for."""
LOOKS_EVERY_S = 1.0
"""How often a store looks whether its file was swapped."""
FORGET = """INSERT INTO forgotten.users VALUES (?, ?)
    ON CONFLICT (user_id) DO UPDATE SET ts = max(ts, excluded.ts)"""
FRESH = ".fresh"
FORGOTTEN = "forgotten.db"
BUSY_S = 5.0
"""How long a writer waits for another gateway's write."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a user."""

    user_id: str
    ts: datetime
    """Of the situation, in UTC and without a zone."""
    vector: np.ndarray
    """e(x), float16 [H]."""
    query: str | None = None
    """The latent query, where it was written down."""

    def row(self) -> tuple[str, float, bytes, str | None]:
        return self.user_id, _seconds(self.ts), self.vector.astype("<f2").tobytes(), self.query


def base_path(folder: str, reader: str) -> Path:
    """The file of a reader's vectors; the reader may be named after a repository or a folder."""
    return Path(folder, f"{quote(reader, safe='+@')}.sqlite")


def write(folder: str, reader: str, kept: Iterable[Kept]) -> int:
    """Writes the file of a reader's vectors, and swaps it for the old one; of a user's several, the newest is kept.

    Who asked to be forgotten after her situation is left out. No situation counts as later than now, or it would
    outlast what truly comes after it.

    Returns:
        How many users it holds.
    """
    target = base_path(folder, reader)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".tmp-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(partial)) as made:
            _know_forgotten(made, target.parent)
            made.execute("PRAGMA main.journal_mode = OFF")  # a file that is not whole is never renamed
            made.execute(TABLE)
            with made:
                made.executemany(PUT, (each.row() for each in kept))
                made.execute("UPDATE vectors SET ts = ?1 WHERE ts > ?1", (time.time(),))
            (users,) = made.execute("SELECT count(*) FROM vectors").fetchone()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return int(users)


class QueryStore:
    """Looks users up; made once a gateway and reader.

    Args:
        folder: where the files are; they may come later.
        reader: whose vectors; `PairSpec.reads`.
        dim: their length.
        max_age_s: of a situation that is still used.

    Raises:
        DataError: when a vector is of another length.
    """

    def __init__(self, folder: str, reader: str, dim: int, max_age_s: float) -> None:
        self.dim, self.max_age_s = dim, max_age_s
        self._place = base_path(folder, reader)
        self._lock = threading.Lock()
        self._base: sqlite3.Connection | None = None
        self._seen: tuple[int, int] | None = None
        self._looked = -LOOKS_EVERY_S
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._fresh = _open(self._place.with_suffix(FRESH))

    def get(self, user_id: str, now: datetime | None = None) -> tuple[np.ndarray, str | None] | None:
        """e(x), float16 [H], and the latent query; None where there is none, or it is too old at `now`."""
        with self._lock:
            self._look()
            found = [
                row
                for connection in (self._base, self._fresh)
                if connection is not None
                for row in connection.execute("SELECT ts, vector, query FROM vectors WHERE user_id = ?", (user_id,))
            ]
            asked = "SELECT ts FROM forgotten.users WHERE user_id = ?"
            (forgotten,) = self._fresh.execute(asked, (user_id,)).fetchone() or (-math.inf,)
        if not found:
            return None
        ts, vector, query = max(found, key=lambda row: float(row[0]))
        if ts <= forgotten or (_seconds(now) if now else time.time()) - ts > self.max_age_s:
            return None
        values = np.frombuffer(vector, "<f2")
        if len(values) != self.dim:
            raise DataError(f"{self._place}: vectors have {len(values)} values; the ranker reads {self.dim}.")
        return values, query

    def put(self, kept: Kept) -> None:
        """Keeps what is newer than what is known; no situation counts as later than now.

        Raises:
            sqlite3.Error: where the disk does not take it.
        """
        user_id, ts, *rest = kept.row()
        with self._lock, self._fresh:
            self._fresh.execute(PUT, (user_id, min(ts, time.time()), *rest))

    def forget(self, user_id: str, now: datetime | None = None) -> None:
        """Uses nothing of a user from before `now`, of any version in the folder, and removes all that was put.

        What `write` has written of her stays in its file, unused, until it writes that again, without her.

        Raises:
            sqlite3.Error: where the disk does not take it.
        """
        with self._lock, self._fresh:
            self._fresh.execute(FORGET, (user_id, _seconds(now) if now else time.time()))
        for file in self._place.parent.glob(f"*{FRESH}"):  # a version may be served again
            with closing(_open(file)) as its, its:
                its.execute("DELETE FROM vectors WHERE user_id = ?", (user_id,))

    def close(self) -> None:
        with self._lock:
            for connection in (self._base, self._fresh):
                if connection is not None:
                    connection.close()
            self._base = None

    def _look(self) -> None:
        """Opens the file anew where another has taken its place."""
        now = time.monotonic()
        if now - self._looked < LOOKS_EVERY_S:
            return
        self._looked = now
        try:
            found = self._place.stat()
        except FileNotFoundError:
            return
        if (found.st_ino, found.st_mtime_ns) == self._seen:
            return
        opened = sqlite3.connect(f"{self._place.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        opened.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
        if self._base is not None:
            self._base.close()
        self._base, self._seen = opened, (found.st_ino, found.st_mtime_ns)
        with suppress(sqlite3.OperationalError), self._fresh:  # another gateway is at it
            self._fresh.execute("DELETE FROM vectors WHERE ts < ?", (time.time() - self.max_age_s,))


def _open(place: Path) -> sqlite3.Connection:
    """A version's file of what has happened since, with those who are forgotten."""
    connection = sqlite3.connect(place, timeout=BUSY_S, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(TABLE)
    _know_forgotten(connection, place.parent)
    return connection


def _know_forgotten(connection: sqlite3.Connection, folder: Path) -> None:
    connection.execute("ATTACH DATABASE ? AS forgotten", (str(folder / FORGOTTEN),))
    connection.execute("PRAGMA forgotten.journal_mode = WAL")
    connection.execute(FORGOTTEN_TABLE)


def _seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()
