"""What was served, as a log that the next run reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rgalign_ray import storage
from rgalign_ray.config import Log, Roles
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.ingest import ingest
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve.collect import collect
from rgalign_ray.serve.feedback import Answer, FeedbackLog, answers, feedback, files

INTENTS = ["i0", "i1", "i2", "i3"]
NOON = datetime(2026, 1, 5, 12)
SCHEMA = pa.schema(
    {
        "hour": pa.float32(),
        "cards": pa.list_(pa.string()),
        "region": pa.string(),
        "ts": TIMESTAMP,
        "history": pa.list_(EVENT),
    }
)


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    catalogue = pa.table(dict.fromkeys(("intent_id", "title", "description", "category"), INTENTS))
    storage.write_table(str(tmp_path / "run/intents.parquet"), catalogue)
    return SimpleNamespace(sessions_uri=str(tmp_path / "run"), reader=lambda: SimpleNamespace(schema=SCHEMA))


def answer(request_id: str, user_id: str = "u1", **body: Any) -> Answer:
    row = {"hour": 3.0, "cards": ["visa"], "region": "SG", "history": []}
    event = {"event": "chat", "text": "hi", "ts": "2026-01-05T11:00:00"}
    its = {
        "row": row | {"history": [event]},
        "candidates": None,
        "slate": ["i2", "i0"],
        "propensity": [0.5, 0.25],
        "version": "v",
        "variant": "a",
        "path": "live",
    }
    return Answer(request_id, user_id, NOON, its | body)


def written(
    folder: Path, given: list[Answer], told: list[tuple[str, dict[str, Any]]], forget: str | None = None
) -> None:
    log = FeedbackLog(str(folder), lost=lambda number: pytest.fail(f"{number} lost"))
    for each in given:
        log.shown(each)
    for request_id, body in told:
        log.told(request_id, body).result(10)
    if forget is not None:
        log.forget(forget, datetime(2026, 2, 1)).result(10)
    log.close()


def test_answers_with_feedback_become_sessions(tmp_path: Path, spec: Any) -> None:
    given = [answer("r1"), answer("r2", candidates=["i2", "i0", "i1"]), answer("untold"), answer("gone", "u2")]
    told = [("r1", {"clicks": ["i0"]}), ("r1", {"resolved": ["i0"]}), ("r2", {"seen": 1, "clicks": ["i2", "i0"]})]
    told += [("gone", {}), ("nobody", {"clicks": ["i1"]})]
    written(tmp_path / "one", given, told)
    (own,) = files(str(tmp_path / "one"))
    other = tmp_path / "other"
    written(other, [answer("r1", slate=["i3"], propensity=[1.0])], [], forget="u2")
    (elsewhere,) = files(str(other))
    elsewhere.rename(own.with_name("~other.feedback"))
    out = tmp_path / "log"
    counts = collect(str(tmp_path / "one"), [spec], str(out))
    assert counts == {
        "sessions": 2,
        "clicked": 2,
        "untold": 1,
        "repeated": 1,
        "forgotten": 1,
        "retired": 0,
        "no_folder": 0,
        "unanswered": 1,
        "not_shown": 1,
    }
    rows = {row["session_id"]: row for row in storage.read_table(str(out / "sessions")).to_pylist()}
    assert rows.keys() == {"r1", "r2"}
    first, second = rows["r1"], rows["r2"]
    assert (first["user_id"], first["region"], first["ts"], first["hour"]) == ("u1", "SG", NOON, 3.0)
    assert first["history"] == [{"event": "chat", "text": "hi", "ts": datetime(2026, 1, 5, 11)}]
    assert first["candidates"] == INTENTS and first["shown"] == [True, False, True, False]
    assert first["clicks"] == first["resolved"] == [True, False, False, False]
    assert first["position"] == [1, -1, 0, -1] and first["propensity"] == [0.25, 0.0, 0.5, 0.0]
    assert second["candidates"] == ["i2", "i0", "i1"] and second["shown"] == [True, False, False]
    assert second["clicks"] == [True, False, False] and second["propensity"] == [0.5, 0.0, 0.0]
    assert (first["served_version"], first["served_variant"], first["served_path"]) == ("v", "a", "live")
    with pytest.raises(ConfigError, match="is there already"):
        collect(str(tmp_path / "one"), [spec], str(out))
    with pytest.raises(ConfigError, match="holds no feedback"):
        collect(str(tmp_path / "none"), [spec], str(tmp_path / "log2"))


def test_who_is_forgotten_is_so_whatever_time_her_client_told(tmp_path: Path, spec: Any) -> None:
    given = [
        answer("before", "u2", received="2026-01-31T23:00:00"),
        answer("after", "u2", received="2026-02-01T01:00:00"),
    ]
    given[0] = replace(given[0], ts=datetime(2026, 3, 1))
    written(tmp_path / "one", given, [("before", {}), ("after", {})])
    (own,) = files(str(tmp_path / "one"))
    written(tmp_path / "other", [], [], forget="u2")
    (elsewhere,) = files(str(tmp_path / "other"))
    elsewhere.rename(own.with_name("~other.feedback"))
    counts = collect(str(tmp_path / "one"), [spec], str(tmp_path / "log"))
    assert (counts["sessions"], counts["forgotten"]) == (1, 1)
    (row,) = storage.read_table(str(tmp_path / "log/sessions")).to_pylist()
    assert (row["session_id"], row["ts"]) == ("after", NOON)


def test_answers_about_intents_that_are_no_more_are_left_out(tmp_path: Path, spec: Any) -> None:
    given = [answer("here"), answer("shown", slate=["i2", "old"]), answer("asked", candidates=["i0", "i2", "old"])]
    written(tmp_path / "one", given, [(each.request_id, {"clicks": [each.body["slate"][1]]}) for each in given])
    counts = collect(str(tmp_path / "one"), [spec], str(tmp_path / "log"))
    assert {name: count for name, count in counts.items() if count} == {"sessions": 1, "clicked": 1, "retired": 2}
    assert storage.read_table(str(tmp_path / "log/sessions"))["session_id"].to_pylist() == ["here"]


def test_answers_of_a_region_that_no_folder_can_be_named_after_are_left_out(tmp_path: Path, spec: Any) -> None:
    regions = {"a": "é" * 40, "b": "é" * 41, "c": "x" * 255, "d": "__HIVE_DEFAULT_PARTITION__", "e": "A/B"}
    given = [answer(name) for name in regions]
    for each in given:
        each.body["row"] = each.body["row"] | {"region": regions[each.request_id]}
    written(tmp_path / "one", given, [(name, {}) for name in regions])
    counts = collect(str(tmp_path / "one"), [spec], str(tmp_path / "log"))
    assert {name: count for name, count in counts.items() if count} == {"sessions": 2, "no_folder": 3}
    rows = storage.read_table(str(tmp_path / "log/sessions")).to_pylist()
    assert {row["session_id"]: row["region"] for row in rows} == {name: regions[name] for name in "ae"}


def test_the_next_run_reads_it(tmp_path: Path, spec: Any) -> None:
    written(tmp_path / "one", [answer("r1"), answer("r2", "u2")], [("r1", {"clicks": ["i0"]}), ("r2", {})])
    out = tmp_path / "log"
    collect(str(tmp_path / "one"), [spec], str(out))
    features = FeatureSpec.model_validate(
        {"fields": [{"name": "hour", "kind": "numeric"}, {"name": "cards", "kind": "multi"}]}
    )
    summary = ingest(
        str(out / "sessions"),
        str(out / "intents.parquet"),
        None,
        str(tmp_path / "in"),
        Roles(),
        1,
        log=Log(),
        feature_columns=features,
    )
    assert (summary.kept, summary.without_click, dict(summary.quarantined)) == (2, 1, {})


KILLED = """
import sys
from datetime import datetime
from rgalign_ray.serve.feedback import Answer, FeedbackLog
log = FeedbackLog(sys.argv[1], lost=lambda number: None)
number = 0
while True:
    name = f"r{number}"
    log.shown(Answer(name, "u", datetime(2026, 1, 1), {"slate": []}))
    log.told(name, {"clicks": []}).result(30)
    print(name, flush=True)
    number += 1
"""


@pytest.mark.fault
def test_killed_at_any_moment_it_loses_nothing_acknowledged(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(20 + 13 * attempt):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = {line.strip() for line in process.stdout}
        process.wait()
        (file,) = files(str(folder))
        there = {each.request_id for each in answers(file)}
        assert len(there) >= 20 and acknowledged <= there
        assert {request_id for request_id, _ in feedback(file)} >= acknowledged
