"""Runs are found by their settings, and only old ones that are not among the latest go."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rgalign_ray import cli, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.ops import runs

NOW = datetime.datetime(2026, 6, 30, tzinfo=datetime.UTC)


def make(folder: Path, name: str, days: float, *stages: str, mark: str = "config.json") -> None:
    """A run whose files are so many days old, each stage a minute younger than the one before."""
    files = [mark, *(f"{stage}/{storage.MANIFEST}" for stage in stages)]
    for minute, file in enumerate(files):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        when = (NOW - datetime.timedelta(days=days)).timestamp() + 60 * minute
        os.utime(path, (when, when))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # as a comparison leaves it: settings stand in its seeds' folders
    make(tmp_path, "old", 90, "seed_0/log", "seed_0/sessions", "seed_0/row_din", ".sessions.half", mark="settled.json")
    make(tmp_path, "older", 100)
    make(tmp_path, "new", 2, "log")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("no run")
    return tmp_path


def test_what_there_is(folder: Path) -> None:
    there = runs.list_runs(str(folder))
    assert [run.name for run in there] == ["older", "old", "new"]
    assert [(run.artefacts, run.last) for run in there] == [(0, ""), (3, "seed_0/row_din"), (1, "log")]
    assert there[1].size == 10 and there[1].changed == NOW - datetime.timedelta(days=90) + datetime.timedelta(minutes=4)
    assert runs.list_runs(str(folder / "nowhere")) == []
    assert [run.uri for run in runs.list_runs(f"file://{folder}")] == [
        f"file://{folder}/{n}" for n in ("older", "old", "new")
    ]


@pytest.mark.parametrize(
    ("keep", "days", "expected"),
    [
        (0, 30, ["older", "old"]),
        (2, 30, ["older"]),
        (3, 0, []),
        (0, 95, ["older"]),
        (0, 0, ["older", "old", "new"]),
        (9, 0, []),
    ],
)
def test_old_ones_that_are_not_among_the_latest_go(folder: Path, keep: int, days: float, expected: list[str]) -> None:
    assert [run.name for run in runs.stale(runs.list_runs(str(folder)), keep, days, NOW)] == expected


def test_nothing_is_removed_before_it_is_asked_for(folder: Path) -> None:
    run = CliRunner().invoke
    assert "older" in run(cli.app, ["runs", "list", str(folder)]).stdout
    shown = run(cli.app, ["runs", "prune", str(folder), "--keep", "1"])
    assert "2 of 3 runs" in shown.stdout and (folder / "old").exists()
    run(cli.app, ["runs", "prune", str(folder), "--keep", "1", "--yes"])
    assert sorted(path.name for path in folder.iterdir()) == ["new", "notes"]


def test_a_death_at_any_moment_of_a_removal_leaves_no_manifest_without_its_rows_and_the_next_try_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("seed_0/log", "seed_0/sessions", "seed_0/row_din"):
        (folder / "old" / stage / "rows.parquet").write_bytes(b"")
    delete, lives = storage.delete, 0

    def mortal(uri: str) -> None:
        nonlocal lives
        lives -= 1
        if lives < 0:
            raise KeyboardInterrupt
        delete(uri)

    monkeypatch.setattr(storage, "delete", mortal)
    for moment in range(20):
        lives = moment
        (old,) = [run for run in runs.list_runs(str(folder)) if run.name == "old"]
        try:
            runs.remove(old)
        except KeyboardInterrupt:
            assert all((path.parent / "rows.parquet").exists() for path in folder.glob("old/seed_0/*/manifest.json"))
        else:
            break
    assert moment > 1 and not (folder / "old").exists()


def test_what_is_said_to_be_removed_is_removed_whatever_the_uri(tmp_path: Path) -> None:
    place = tmp_path / "my runs"
    make(place, "old run", 90, "log")
    uri = f"file://{str(place).replace(' ', '%20')}/"
    shown = CliRunner().invoke(cli.app, ["runs", "prune", uri, "--keep", "0", "--yes"])
    assert "1 of 1 runs" in shown.stdout
    assert not (place / "old run").exists()


def test_a_file_holds_no_runs(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    with pytest.raises(ConfigError, match=r"notes: a file; expected a folder that holds run directories"):
        runs.list_runs(str(tmp_path / "notes"))
