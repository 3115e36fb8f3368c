"""What was shown to whom and what became of it, kept until `rgalign collect` makes a log of it.

  answers ──▶ ┐
              ├─▶ one writer a gateway, a transaction for all that waits ──▶ SQLite, one file a machine ──▶ collect
  feedback ─▶ ┘        └── feedback is acknowledged when its transaction is on the disk

A file is written in order, so that an answer is on the disk before the feedback on it is acknowledged, whichever
gateway of the machine gave it.
"""

from __future__ import annotations

import json
import queue
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    request_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, ts TEXT NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_user ON answers (user_id);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY, request_id TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS feedback_request ON feedback (request_id);
CREATE TABLE IF NOT EXISTS forgotten (user_id TEXT PRIMARY KEY, ts TEXT NOT NULL) WITHOUT ROWID;
"""
SUFFIX = ".feedback"
BUSY_S = 30.0
"""How long a writer waits for another gateway's transaction."""
MOST_WAITING = 100_000
"""What may wait for the disk; beyond it answers are counted as lost, and feedback is refused."""


Work = Callable[[sqlite3.Connection], int]
"""What is to be done within a transaction, and how many rows it was."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a user was shown."""

    request_id: str
    user_id: str
    ts: datetime
    """Of the session, in UTC."""
    body: dict[str, Any]
    """row, candidates, slate, propensity, version, variant, path, received."""

    @property
    def received(self) -> datetime:
        """When the server was asked, in UTC; files of earlier versions have no more than the client's `ts`."""
        received = self.body.get("received")
        return self.ts if received is None else datetime.fromisoformat(received)


class FeedbackLog:
    """Writes answers and feedback of one gateway into the file of its machine.

    Args:
        folder: where the file is.
        lost: called with the number of answers that could not be kept.
    """

    def __init__(self, folder: str, lost: Callable[[int], object]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._place = Path(folder, f"{socket.gethostname()}{SUFFIX}")
        self._lost = lost
        self._waiting: queue.Queue[tuple[Work, Future[int] | None] | None] = queue.Queue(MOST_WAITING)
        with closing(_open(self._place)) as made:
            made.executescript(TABLES)
        self._writer = threading.Thread(target=self._write, name="feedback", daemon=True)
        self._writer.start()

    def shown(self, answer: Answer) -> None:
        """Keeps an answer; it is written a moment later. An id that was there before keeps what was shown first."""
        row = (answer.request_id, answer.user_id, answer.ts.isoformat(), json.dumps(answer.body))
        try:
            self._take(_statement("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", *row), None)
        except OSError:
            self._lost(1)

    def told(self, request_id: str, body: dict[str, Any]) -> Future[int]:
        """Keeps feedback; done when it is on the disk, and fails with what kept it from there."""
        return self._put(
            _statement("INSERT INTO feedback (request_id, body) VALUES (?, ?)", request_id, json.dumps(body))
        )

    def forget(self, user_id: str, now: datetime) -> Future[int]:
        """Removes a user's answers and their feedback, here at once and those of other machines as they are collected.

        Returns:
            How many answers were here, when they are gone from the disk.
        """

        def work(connection: sqlite3.Connection) -> int:
            own = "SELECT request_id FROM answers WHERE user_id = ?"
            connection.execute(f"DELETE FROM feedback WHERE request_id IN ({own})", (user_id,))
            connection.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (user_id, now.isoformat()))
            return connection.execute("DELETE FROM answers WHERE user_id = ?", (user_id,)).rowcount

        return self._put(work)

    def close(self) -> None:
        """Writes what waits."""
        self._waiting.put(None)
        self._writer.join()

    def check(self) -> None:
        """Raises RuntimeError where nothing can be kept any more."""
        if not self._writer.is_alive():
            raise RuntimeError("the writer of feedback has ended")

    def _put(self, work: Work) -> Future[int]:
        done: Future[int] = Future()
        try:
            self._take(work, done)
        except OSError as error:
            done.set_exception(error)
        return done

    def _take(self, work: Work, done: Future[int] | None) -> None:
        if not self._writer.is_alive():  # what it has not taken, nobody takes
            raise OSError("the writer has ended")
        try:
            self._waiting.put_nowait((work, done))
        except queue.Full:  # waiting here would hold up every request of the gateway
            raise OSError(f"{MOST_WAITING:,} others wait for the disk") from None

    def _write(self) -> None:
        with closing(_open(self._place)) as connection:
            ended = False
            while not ended:
                batch = [self._waiting.get()]
                while not self._waiting.empty():
                    batch.append(self._waiting.get())
                ended = None in batch
                asked = [
                    (work, done)
                    for work, done in filter(None, batch)
                    if done is None or done.set_running_or_notify_cancel()  # from here on nobody can cancel it
                ]
                try:
                    with connection:
                        changed = [work(connection) for work, _ in asked]
                except Exception as error:  # a full disk, say: told to those who wait; the writer goes on
                    for _, done in asked:
                        if done is not None:
                            done.set_exception(error)
                    self._lost(sum(done is None for _, done in asked))
                    continue
                for (_, done), rows in zip(asked, changed, strict=True):
                    if done is not None:
                        done.set_result(rows)


def _statement(statement: str, *row: Any) -> Work:
    return lambda connection: connection.execute(statement, row).rowcount


def files(folder: str) -> list[Path]:
    """Of all machines."""
    return sorted(Path(folder).glob(f"*{SUFFIX}"))


def answers(file: Path) -> Iterator[Answer]:
    """In the order of their ids."""
    with closing(_open(file)) as connection:
        for request_id, user_id, ts, body in connection.execute("SELECT * FROM answers ORDER BY request_id"):
            yield Answer(request_id, user_id, datetime.fromisoformat(ts), json.loads(body))


def feedback(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Request ids and what was told of them, in the order of arrival."""
    with closing(_open(file)) as connection:
        for request_id, body in connection.execute("SELECT request_id, body FROM feedback ORDER BY number"):
            yield request_id, json.loads(body)


def forgotten(file: Path) -> Iterator[tuple[str, datetime]]:
    """Users, and the time before which nothing of them is used."""
    with closing(_open(file)) as connection:
        for user_id, ts in connection.execute("SELECT user_id, ts FROM forgotten"):
            yield user_id, datetime.fromisoformat(ts)


def _open(place: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=BUSY_S)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # in WAL mode, a commit is on the disk when it returns
    connection.execute("PRAGMA secure_delete = ON")
    return connection
