from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from rgalign_ray import schema, storage
from rgalign_ray.config import Log, Roles, load
from rgalign_ray.errors import DataError, UserError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.ingest import ingest
from rgalign_ray.logs.prompts import Template
from rgalign_ray.logs.sources import movielens, wheels

FILMS = 25


def lines(*rows: str) -> str:
    return "".join(row.replace(" | ", "\t") + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """User 1 rated 23 films, one a minute from the highest number down; users 2 and 10 rated 10 and 3, all at once."""
    titles = {1: "Godfather, The | 1972 | Drama Crime", 2: "unknown |  | unknown"}
    films = [f"{i} | {titles.get(i, f'Film {i} | 1990 | Comedy')}" for i in range(1, FILMS + 1)]
    ratings = [f"1 | {FILMS - i} | {1 + i % 5} | {880000000 + 60 * i}" for i in range(23)]
    ratings += [f"2 | {i} | 4 | 880000000" for i in range(10, 0, -1)] + [f"10 | {i} | 3 | 880000000" for i in (1, 2, 3)]
    (tmp_path / "ml-100k.item").write_text(
        lines("item_id:token | movie_title:token_seq | release_year:token | class:token_seq", *films)
    )
    (tmp_path / "ml-100k.inter").write_text(
        lines("user_id:token | item_id:token | rating:float | timestamp:float", *ratings)
    )
    (tmp_path / "ml-100k.user").write_text(
        lines(
            "user_id:token | age:token | gender:token | occupation:token | zip_code:token",
            *["1 | 24 | M | technician | 85711", "2 | 53 | F | other | 94043", "10 | 30 | F | writer | T8H1N"],
        )
    )
    return tmp_path


def prepared(folder: Path, name: str = "out") -> dict[str, dict]:
    movielens.prepare(folder, str(folder / name))
    return {row["session_id"]: row for row in storage.read_table(str(folder / name / "sessions")).to_pylist()}


def test_ten_films_are_a_session_and_the_rest_is_counted(folder: Path) -> None:
    counts = movielens.prepare(folder, str(folder / "out"))
    assert counts == {
        **{"users": 3, "films": FILMS, "sessions": 3, "left_over": 6},
        **{"candidates": 30, "clicks": sum(1 + i % 5 >= 4 for i in range(20)) + 10},
    }
    sessions = prepared(folder)
    assert sorted(sessions) == ["user_1-000", "user_1-001", "user_2-000"]
    first = sessions["user_1-000"]
    assert sorted(first["candidates"]) == sorted(f"film_{i}" for i in range(16, 26))
    assert all(first["shown"])
    stars = {f"film_{FILMS - i}": 1 + i % 5 for i in range(23)}
    for session in (first, sessions["user_1-001"]):
        assert session["clicks"] == [stars[film] >= 4 for film in session["candidates"]]


def test_history_and_features_come_from_strictly_earlier_films(folder: Path) -> None:
    first, second = (prepared(folder)[f"user_1-00{i}"] for i in (0, 1))
    assert (first["history"], first["ratings"], first["mean_rating"]) == ([], 0, None)
    assert [event["event"] for event in second["history"]] == [f"film_{FILMS - i}" for i in range(10)]
    assert all(event["ts"] < second["ts"] for event in second["history"])
    assert set(second["candidates"]).isdisjoint(event["event"] for event in second["history"])
    assert (second["ratings"], second["mean_rating"], second["favourite_genres"]) == (10, 3.0, ["Comedy"])
    assert second["history"][0]["text"] == "Film 25: 1 star"
    assert second["history"][1]["text"] == "Film 24: 2 stars"


def test_films_rated_at_the_moment_of_a_session_are_not_its_past(folder: Path) -> None:
    with (folder / "ml-100k.inter").open("a") as stream:
        stream.write("".join(f"2\t{i}\t4\t880000000\n" for i in range(11, 21)))
    sessions = prepared(folder)
    assert sessions["user_2-001"]["history"] == []
    assert sessions["user_2-001"]["ratings"] == 0
    assert sorted(sessions["user_2-000"]["candidates"]) == sorted(f"film_{i}" for i in range(1, 11)), "ties: by film"


def test_the_order_of_candidates_tells_nothing_and_is_always_the_same(folder: Path) -> None:
    first = prepared(folder)["user_1-000"]["candidates"]
    assert first != [f"film_{i}" for i in range(25, 15, -1)]
    assert first != sorted(first)
    again = prepared(folder, "again")["user_1-000"]["candidates"]
    assert again == first
    names = [p.relative_to(folder / "out") for p in sorted((folder / "out").rglob("*.parquet"))]
    for name in names:
        assert (folder / "out" / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_intents_are_films(folder: Path) -> None:
    prepared(folder)
    intents = {row["intent_id"]: row for row in storage.read_table(str(folder / "out/intents.parquet")).to_pylist()}
    assert intents["film_1"] == {
        **{"intent_id": "film_1", "title": "The Godfather", "category": "Drama"},
        "description": "Drama, Crime film of 1972.",
    }
    assert intents["film_2"]["description"] == "unknown film."


def test_the_prepared_log_passes_ingest_spec_and_template(folder: Path) -> None:
    sessions = prepared(folder)
    summary = ingest(
        *(str(folder / "out/sessions"), str(folder / "out/intents.parquet"), None, str(folder / "log")),
        Roles(test_days=0),
        rounds=1,
        log=Log(source="movielens"),
        feature_columns=FeatureSpec.load("movielens"),
    )
    assert summary.kept == len(sessions) == 3
    assert not summary.quarantined
    table = storage.read_table(str(folder / "log/sessions"))
    schema.check(table.schema, schema.SESSIONS, "log", extra=True)
    texts = dict(zip(table["session_id"].to_pylist(), Template.load("movielens").sessions(table), strict=True))
    assert texts["user_1-000"] == "nothing yet."
    assert texts["user_1-001"] == "Comedy. Film 16: 5 stars; Film 17: 4 stars; Film 21: 5 stars; Film 22: 4 stars"


DAY = 86_400


def split(folder: Path, name: str) -> list[dict]:
    """Sessions of 40 people, each of whom rated 30 of 60 films in three evenings, as the configuration `name` reads
    them: the first evenings of all lie in week one, the others in any of ten weeks."""
    films = [f"{i} | Film {i} | 1990 | Comedy" for i in range(1, 61)]
    ratings = [
        f"{user} | {1 + (7 * user + i) % 60} | {1 + (user + i) % 5} | {880_000_000 + evening * DAY + i}"
        for user in range(1, 41)
        for i in range(30)
        for evening in [(user % 7) + (0, user % 30, user % 63)[i // 10]]
    ]
    for file, rows in ((movielens.FILES[1], films), (movielens.FILES[0], ratings)):
        header = (folder / file).read_text().splitlines()[0]
        (folder / file).write_text(header + "\n" + lines(*rows))
    people = [f"{user} | 30 | F | writer | T8H1N" for user in range(1, 41)]
    header = (folder / movielens.FILES[2]).read_text().splitlines()[0]
    (folder / movielens.FILES[2]).write_text(header + "\n" + lines(*people))
    settings = load(name)
    movielens.prepare(folder, str(folder / "out"))
    ingest(
        *(str(folder / "out/sessions"), str(folder / "out/intents.parquet"), None, str(folder / "log")),
        settings.roles,
        settings.rounds,
        log=settings.log,
        feature_columns=FeatureSpec.load(settings.features.spec),
    )
    return storage.read_table(str(folder / "log/sessions")).to_pylist()


def learns(row: dict) -> bool:
    return row["role"] not in ("test", "none")


def test_split_by_time_tests_on_what_comes_last(folder: Path) -> None:
    rows = split(folder, "movielens_by_time")
    training, test = [r for r in rows if learns(r)], [r for r in rows if r["role"] == "test"]
    assert test and max(r["ts"] for r in training) < min(r["ts"] for r in test)
    assert len(training) + len(test) == len(rows) == 120


def test_split_by_user_tests_on_people_nobody_learned_from(folder: Path) -> None:
    rows = split(folder, "movielens_new_users")
    test = [r for r in rows if r["role"] == "test"]
    assert test and {r["user_id"] for r in test}.isdisjoint(r["user_id"] for r in rows if learns(r))
    rated = {(r["user_id"], film) for r in rows for film in r["candidates"]}
    for row in rows:
        assert all((row["user_id"], e["event"]) in rated and e["ts"] < row["ts"] for e in row["history"])


def test_split_by_film_tests_on_films_nobody_learned_from(folder: Path) -> None:
    rows = split(folder, "movielens_cold_films")
    known = {film for r in rows if learns(r) for film in (*r["candidates"], *(e["event"] for e in r["history"]))}
    test = [r for r in rows if r["role"] == "test"]
    assert len(known) == 42, "seven in ten of sixty films"
    assert test and known.isdisjoint(film for r in test for film in r["candidates"])
    assert known & {e["event"] for r in test for e in r["history"]}, "what they watched before is known"
    assert max(r["ts"] for r in rows if learns(r)) < min(r["ts"] for r in test)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("ml-100k.inter", "rating:float", "stars:float", ["ml-100k.inter", "'rating' is missing"]),
        ("ml-100k.inter", "1\t25\t1\t", "1\t25\tfive\t", ["line 2", "'rating' is 'five'", "a number"]),
        ("ml-100k.inter", "1\t25\t1\t", "1\t999\t1\t", ["film '999'"]),
        ("ml-100k.user", "1\t24\tM\t", "1\t24\t", ["ml-100k.user", "line 2 has 4 columns; expected 5"]),
        ("ml-100k.item", None, None, ["ml-100k.item", "no such file"]),
    ],
)
def test_faulty_files_are_named(folder: Path, file: str, old: str | None, new: str | None, words: list[str]) -> None:
    path = folder / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError) as error:
        movielens.prepare(folder, str(folder / "out"))
    assert all(word in str(error.value) for word in words)


def pretend(monkeypatch: pytest.MonkeyPatch, code: int, files: tuple[str, ...] = movielens.FILES) -> list[list[str]]:
    """Replaces pip by a process that makes a wheel holding `files` or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        calls.append(command)
        if code == 0:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "recbole-1.2.1.whl", "w") as wheel:
                for name in files:
                    wheel.writestr(movielens.INSIDE + name, name)
        return subprocess.CompletedProcess(command, code, "", "warning\nERROR: no route to the index")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def test_fetch_downloads_once_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, 0)
    folder = movielens.fetch(tmp_path)
    assert movielens.fetch(tmp_path) == folder
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted(movielens.FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["ml-100k"]


@pytest.mark.parametrize(
    ("code", "files", "words"),
    [(1, movielens.FILES, "no route to the index.*log.uri"), (0, movielens.FILES[:1], "does not hold.*ml-100k.item")],
)
def test_a_failed_fetch_says_why_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, files: tuple[str, ...], words: str
) -> None:
    pretend(monkeypatch, code, files)
    with pytest.raises(UserError, match=words):
        movielens.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
