"""Vectors kept for users."""

from __future__ import annotations

import multiprocessing
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from rgalign_ray.errors import DataError
from rgalign_ray.serve import query_store
from rgalign_ray.serve.query_store import Kept, QueryStore

NOW = datetime.now(UTC).replace(tzinfo=None)
DAY_S = 86400.0


def kept(user: str, hours_ago: float, value: float, query: str | None = None) -> Kept:
    return Kept(user, NOW - timedelta(hours=hours_ago), np.full(3, value, np.float16), query)


def opened(folder: Path, dim: int = 3) -> QueryStore:
    return QueryStore(str(folder), "r1", dim, DAY_S)


def value(store: QueryStore, user: str) -> float | None:
    found = store.get(user, NOW)
    return None if found is None else float(found[0][0])


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_store, "LOOKS_EVERY_S", 0.0)


def test_a_reader_may_be_named_after_a_repository_or_a_folder(tmp_path: Path) -> None:
    for reader in ("Qwen/Qwen3-4B+1.sft@0123abcd", "/models/mine", "../mine"):
        query_store.write(str(tmp_path / "store"), reader, [kept("anna", 1, 1.0)])
        assert value(QueryStore(str(tmp_path / "store"), reader, 3, DAY_S), "anna") == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"store"}, "nothing lies beside the folder"


def test_the_newest_of_a_user_is_kept_and_what_is_too_old_is_not_used(tmp_path: Path) -> None:
    rows = [kept("a", 2, 1), kept("a", 1, 2, "newest"), kept("a", 3, 3), kept("b", 25, 4)]
    assert query_store.write(str(tmp_path), "r1", rows) == 2
    store = opened(tmp_path)
    assert store.get("a", NOW) is not None and store.get("a", NOW)[1] == "newest"  # type: ignore[index]
    assert [value(store, user) for user in "abc"] == [2.0, None, None]
    store.close()


def test_a_file_that_is_swapped_is_met_by_those_who_have_it_open(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert value(store, "a") is None, "there is no file yet"
    for number in (1, 2):
        query_store.write(str(tmp_path), "r1", [kept("a", 1, number)])
        assert value(store, "a") == number
    store.close()


def test_what_has_happened_since_counts_and_is_shared(tmp_path: Path) -> None:
    query_store.write(str(tmp_path), "r1", [kept("a", 3, 1)])
    one, other = opened(tmp_path), opened(tmp_path)
    one.put(kept("a", 1, 2))
    one.put(kept("a", 2, 9))  # arrives late
    assert value(other, "a") == 2.0
    query_store.write(str(tmp_path), "r1", [kept("a", 0.5, 3)])
    assert value(other, "a") == 3.0, "the job has read her since"
    one.forget("a", NOW)
    assert value(other, "a") is None
    other.put(Kept("a", NOW + timedelta(hours=1), np.full(3, 4, np.float16)))
    assert value(one, "a") == 4.0, "she came back"
    one.close()
    other.close()


def test_who_is_forgotten_is_so_whatever_time_her_client_told(tmp_path: Path) -> None:
    query_store.write(str(tmp_path), "r1", [kept("a", -1, 1), kept("a", -2, 2), kept("b", 1, 3)])
    store = opened(tmp_path)
    assert value(store, "a") == 2.0, "the newest of those that are all to come"
    store.forget("a")
    assert (value(store, "a"), value(store, "b")) == (None, 3.0)
    store.put(kept("a", -3, 4))
    assert value(store, "a") == 4.0, "she came back"
    store.forget("a")
    assert value(store, "a") is None
    store.put(kept("a", 1, 5))
    assert value(store, "a") is None, "what was read before arrives late"
    store.close()


def test_who_is_forgotten_is_so_by_every_version(tmp_path: Path) -> None:
    stores = [QueryStore(str(tmp_path), version, 3, DAY_S) for version in ("r1", "r2")]
    for store in stores:
        store.put(kept("a", 0, 1, "where is my secret"))
        store.put(kept("b", 0, 2))
    stores[0].forget("a", NOW)
    assert [value(store, user) for store in stores for user in "ab"] == [None, 2.0, None, 2.0]
    query_store.write(str(tmp_path), "r3", [kept("a", 1, 3, "where is my secret"), kept("b", 1, 4)])
    stores.append(QueryStore(str(tmp_path), "r3", 3, DAY_S))
    assert [value(stores[2], user) for user in "ab"] == [None, 4.0], "read ahead of a log that still has her"
    for store in stores:
        store.close()
    for file in tmp_path.iterdir():
        assert b"my secret" not in file.read_bytes(), file


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    query_store.write(str(tmp_path), "r1", [kept("a", 1, 1)])
    store = opened(tmp_path, dim=5)
    with pytest.raises(DataError, match="vectors have 3 values; the ranker reads 5"):
        store.get("a", NOW)
    store.close()


def _dies(folder: str) -> None:
    def rows():  # type: ignore[no-untyped-def]
        yield kept("a", 1, 7)
        os.kill(os.getpid(), signal.SIGKILL)

    query_store.write(folder, "r1", rows())


@pytest.mark.fault
def test_a_job_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    query_store.write(str(tmp_path), "r1", [kept("a", 1, 1)])
    job = multiprocessing.get_context("spawn").Process(target=_dies, args=(str(tmp_path),))
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    store = opened(tmp_path)
    assert value(store, "a") == 1.0
    store.close()
