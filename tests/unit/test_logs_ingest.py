from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs_data import ENTRY, INTENTS, SCHEMA, SPEC, event, run, session, table, write

from rgalign_ray import schema, storage
from rgalign_ray.config import Log, Roles
from rgalign_ray.errors import DataError
from rgalign_ray.logs import faults, ingest
from rgalign_ray.logs.feature_spec import FeatureSpec, FieldSpec, HistorySpec
from rgalign_ray.logs.features import FeatureSpace

Spoil = Callable[[Path], Any]

# What can be wrong with one row, the reason it is given, and a word of the particulars.
ROW_FAULTS = {
    "no session id": (session(1, session_id=None), "null_id", ""),
    "empty session id": (session(1, session_id=""), "null_id", ""),
    "no user id": (session(1, user_id=None), "null_id", ""),
    "no time": (session(1, ts=None), "null_time", ""),
    "no region": (session(1, region=None), "null_region", ""),
    "a region too long for a folder": (session(1, region="é" * 60), "region_name", "region é"),
    "a region that stands for null": (session(1, region="__HIVE_DEFAULT_PARTITION__"), "region_name", "__HIVE"),
    "session id of an earlier row": (session(0, user_id="another"), "duplicate_session", "s0"),
    "no candidates": (session(1, candidates=[], shown=[], clicks=[]), "no_candidates", ""),
    "null candidates": (session(1, candidates=None), "no_candidates", ""),
    "unknown intent": (session(1, candidates=["speed_up", "teleport", "x"]), "unknown_intent", "teleport"),
    "null intent": (session(1, candidates=["speed_up", None, "cancel"]), "unknown_intent", "None"),
    "candidate twice": (session(1, candidates=["refund", "cancel", "refund"]), "duplicate_candidate", "refund"),
    "shown too short": (session(1, shown=[True, True]), "shown_length", "shown 2, candidates 3"),
    "shown missing": (session(1, shown=None), "shown_length", "shown 0"),
    "clicks too long": (session(1, clicks=[True, False, False, True]), "clicks_length", "clicks 4, candidates 3"),
    "both too short": (session(1, shown=[False], clicks=[True]), "shown_length", "shown 1, candidates 3"),
    "clicks missing": (session(1, clicks=None), "clicks_length", "clicks 0"),
    "null in clicks": (session(1, clicks=[True, None, False]), "null_label", "clicks"),
    "null in shown": (session(1, shown=[None, True, True], clicks=[False] * 3), "null_label", "shown"),
    "click on what was not shown": (session(1, clicks=[False, False, True]), "click_not_shown", "candidate 2"),
    "infinite feature": (session(1, days_late=math.inf), "non_finite_feature", "days_late is inf"),
    "feature that is no number": (session(1, days_late=math.nan), "non_finite_feature", "days_late is nan"),
    "event after the entry": (session(1, history=[event("a", 1), event("b", -1)]), "event_after_entry", "1 of 2"),
    "event without a time": (session(1, history=[{"event": "a", "text": "", "ts": None}]), "event_without_time", ""),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "detail"), ROW_FAULTS.values(), ids=ROW_FAULTS.keys())
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path: Path, row: dict, reason: str, detail: str) -> None:
    write(tmp_path, table(session(0), row, session(2)))
    summary = run(tmp_path)
    assert summary.quarantined == {reason: 1}
    assert (summary.rows, summary.kept) == (3, 2)
    aside = storage.read_table(str(tmp_path / "out/quarantine.parquet"))
    assert aside.schema.equals(schema.QUARANTINE)
    (entry,) = aside.to_pylist()
    assert (entry["file"], entry["row"], entry["reason"]) == ("0.parquet", 1, reason)
    assert entry["session_id"] == row["session_id"]
    assert detail in entry["detail"]
    assert sorted(storage.read_table(str(tmp_path / "out/sessions"))["session_id"].to_pylist()) == ["s0", "s2"]


def test_a_batch_of_many_faults_names_each_by_its_own_row(tmp_path: Path) -> None:
    """Lists of all lengths stand in one batch: a fault must not move to a neighbour."""
    rows = [
        session(0, candidates=["refund"], shown=[True], clicks=[True]),
        session(1, shown=[False], clicks=[True]),
        session(2, shown=[True, False, True], clicks=[True, False, False]),
        session(3, shown=[True, False, False], clicks=[False, True, True]),
        session(4, candidates=["cancel", "cancel"], shown=[True] * 2, clicks=[False] * 2),
        session(5, candidates=["teleport", "refund", "refund"]),
        session(6, candidates=None, shown=None, clicks=None),
        session(7),
    ]
    write(tmp_path, table(*rows))
    run(tmp_path)
    aside = storage.read_table(str(tmp_path / "out/quarantine.parquet")).to_pylist()
    assert [(entry["row"], entry["reason"], entry["detail"]) for entry in aside] == [
        (1, "shown_length", "shown 1, candidates 3"),
        (3, "click_not_shown", "candidate 1 (from 0)"),
        (4, "duplicate_candidate", "intent cancel"),
        (5, "unknown_intent", "intent teleport"),
        (6, "no_candidates", ""),
    ]


def test_every_reason_is_documented_and_tried() -> None:
    tried = {reason for _, reason, _ in ROW_FAULTS.values()}
    assert tried | {"unknown_candidate_set", "other_length", "position_range"} == set(faults.REASONS)


SOUND_ODDITIES = {
    "no click": session(1, clicks=[False] * 3),
    "nothing shown": session(1, shown=[False] * 3, clicks=[False] * 3),
    "null feature": session(1, days_late=None, status=None, tags=None),
    "empty history": session(1, history=[]),
    "null history": session(1, history=None),
    "event at the moment of the entry": session(1, history=[event("a", 0)]),
    "another number of candidates": session(1, candidates=["refund"], shown=[True], clicks=[True]),
}


@pytest.mark.parametrize("row", SOUND_ODDITIES.values(), ids=SOUND_ODDITIES.keys())
def test_an_odd_but_sound_row_is_kept(tmp_path: Path, row: dict) -> None:
    write(tmp_path, table(session(0), row))
    summary = run(tmp_path)
    assert (summary.kept, summary.quarantined) == (2, {})


SOUND = table(session(0))


def without(column: str) -> pa.Table:
    return SOUND.drop_columns([column])


def recast(column: str, value: Any) -> pa.Table:
    return SOUND.set_column(SOUND.column_names.index(column), column, pa.array([value]))


def files(*rows: pa.Table) -> Spoil:
    """A source of these files."""
    return lambda folder: write(folder, *rows)


def damaged(change: Callable[[bytes], bytes]) -> Spoil:
    """A sound source whose one file is changed byte by byte."""

    def spoil(folder: Path) -> None:
        file = write(folder, SOUND) / "0.parquet"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def knowledge_base(intents: pa.Table | None) -> Spoil:
    """A sound source with these intents, or without the file."""

    def spoil(folder: Path) -> None:
        write(folder, SOUND)
        (folder / "intents.parquet").unlink()
        if intents is not None:
            pq.write_table(intents, folder / "intents.parquet")

    return spoil


def intents_and(intent_id: str, title: str | None = "Another") -> pa.Table:
    return pa.Table.from_pylist([*INTENTS.to_pylist(), {"intent_id": intent_id, "title": title}], schema=INTENTS.schema)


BUYERS = SOUND.append_column("role", pa.array(["buyer"]))
SETS = SOUND.drop_columns("candidates").append_column("candidate_set", pa.array(["all"]))
NOTES = [table(session(i)).append_column("note", pa.array([note])) for i, note in enumerate(("a", 1))]

# What stops the run: the spoilt source, and what the one line must say.
STRUCTURAL_FAULTS = {
    "missing column": (files(without("clicks")), ["0.parquet", "'clicks' is missing", "expected list<"]),
    "missing feature": (files(without("days_late")), ["0.parquet", "'days_late' is missing", "numeric"]),
    "missing in the second file": (files(SOUND, without("ts")), ["1.parquet", "'ts' is missing"]),
    "no candidates column": (files(without("candidates")), ["0.parquet", "'candidates'", "both are missing"]),
    "two kinds of candidates": (files(SOUND, SETS), ["1.parquet", "name candidate sets", "0.parquet", "list cand"]),
    "wrong type": (files(recast("clicks", "yes")), ["0.parquet", "'clicks' is string", "expected list<"]),
    "wrong type of a feature": (files(recast("days_late", "7")), ["0.parquet", "'days_late' is string", "a number"]),
    "clicks as numbers": (files(recast("clicks", [1.0, math.nan, 0.0])), ["'clicks' is list<", "expected list<"]),
    "time as text": (files(recast("ts", "2026-01-01")), ["0.parquet", "'ts' is string", "expected timestamp"]),
    "files that disagree": (files(*NOTES), ["1.parquet", "'note' is int64", "expected string", "0.parquet"]),
    "roles of its own": (files(SOUND, BUYERS), ["1.parquet", "'role'", "'buyer'", "rename"]),
    "0 bytes": (damaged(lambda b: b""), ["0.parquet", "0 bytes"]),
    "truncated": (damaged(lambda b: b[: len(b) // 2]), ["0.parquet", "not a whole Parquet file"]),
    "damaged pages": (damaged(lambda b: b[:4] + b"\xff" * 900 + b[904:]), ["0.parquet", "not a whole Parquet file"]),
    "not Parquet": (damaged(lambda b: b"session_id,user_id\n"), ["0.parquet", "not a whole Parquet file"]),
    "no folder": (lambda folder: write(folder).rmdir(), ["source", "no such folder"]),
    "empty folder": (files(), ["source", "holds no Parquet file"]),
    "no rows": (files(table()), ["source", "has no rows"]),
    "only bad rows": (files(table(session(0, clicks=None))), ["no sound session", "1 of 1", "clicks_length"]),
    "intents missing": (knowledge_base(None), ["intents.parquet", "no such file"]),
    "no intents": (knowledge_base(INTENTS.slice(0, 0)), ["intents.parquet", "no intents"]),
    "intents without a title": (knowledge_base(INTENTS.drop_columns("title")), ["'title' is missing"]),
    "intent twice": (knowledge_base(intents_and("refund")), ["intents.parquet", "'intent_id'", "'refund' 2 times"]),
    "intent without an id": (knowledge_base(intents_and("")), ["intents.parquet", "'intent_id'", "empty id"]),
    "intent with a null title": (knowledge_base(intents_and("x", None)), ["intents.parquet", "'title'", "'x'"]),
    "intent with a blank title": (knowledge_base(intents_and("x", " ")), ["intents.parquet", "'title'", "'x'"]),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), STRUCTURAL_FAULTS.values(), ids=STRUCTURAL_FAULTS.keys())
def test_a_structural_fault_stops_with_one_line(tmp_path: Path, spoil: Spoil, words: list[str]) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        run(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_null_descriptions_and_categories_of_intents_become_empty(tmp_path: Path) -> None:
    write(tmp_path, SOUND, intents=intents_and("x"))
    run(tmp_path)
    rows = storage.read_table(str(tmp_path / "out/intents.parquet")).to_pylist()
    assert rows[-1] == {"intent_id": "x", "title": "Another", "description": "", "category": ""}
    assert rows[:-1] == sorted(INTENTS.to_pylist(), key=lambda row: row["intent_id"])


def test_a_position_that_would_not_fit_is_set_aside(tmp_path: Path) -> None:
    columns = pa.schema([*SCHEMA, ("position", pa.list_(pa.int64()))])
    rows = [session(0, position=[1, 2, None]), session(1, position=[1, 70_000, 3]), session(2, position=None)]
    write(tmp_path, table(*rows, columns=columns))
    assert run(tmp_path).quarantined == {"position_range": 1}
    kept = storage.read_table(str(tmp_path / "out/sessions")).sort_by("session_id")
    assert kept["position"].to_pylist() == [[1, 2, None], None]


def test_sessions_that_name_a_candidate_set(tmp_path: Path) -> None:
    named = [("candidate_set", pa.string()), ("resolved", pa.list_(pa.bool_()))]
    columns = pa.schema([*(field for field in SCHEMA if field.name != "candidates"), *named])
    rows = [
        session(0, candidate_set="all"),
        session(1, candidate_set="old"),
        session(2, candidate_set=None),
        session(3, candidate_set="all", clicks=[True]),
        session(4, candidate_set="all", resolved=[True]),
        session(5, candidate_set="all", resolved=[True, False, False]),
    ]
    write(tmp_path, table(*[{k: v for k, v in row.items() if k != "candidates"} for row in rows], columns=columns))
    sets = [{"candidate_set": "all", "intents": ["speed_up", "cancel", "refund"]}]
    sets = pa.Table.from_pylist(sets, schema=schema.CANDIDATE_SETS)
    pq.write_table(sets, tmp_path / "sets.parquet")
    summary = run(tmp_path, candidate_sets=str(tmp_path / "sets.parquet"))
    assert summary.quarantined == {
        "unknown_candidate_set": 1,
        "no_candidates": 1,
        "clicks_length": 1,
        "other_length": 1,
    }
    assert summary.kept == 2
    assert storage.read_table(str(tmp_path / "out/candidate_sets.parquet")).equals(sets)


@pytest.mark.parametrize(
    ("members", "words"), [(["teleport"], ["'all'", "'teleport'"]), (["refund", "refund"], ["'all'", "2 times"])]
)
def test_a_candidate_set_must_fit_the_knowledge_base(tmp_path: Path, members: list[str], words: list[str]) -> None:
    write(tmp_path, table(session(0)))
    sets = pa.Table.from_pylist([{"candidate_set": "all", "intents": members}], schema=schema.CANDIDATE_SETS)
    pq.write_table(sets, tmp_path / "sets.parquet")
    with pytest.raises(DataError) as error:
        run(tmp_path, candidate_sets=str(tmp_path / "sets.parquet"))
    assert all(word in str(error.value) for word in words)


def test_the_first_of_equal_session_ids_stays_across_files_too(tmp_path: Path) -> None:
    write(tmp_path, table(session(0, region="A"), session(1)), table(session(0, region="B"), session(1), session(2)))
    summary = run(tmp_path)
    kept = storage.read_table(str(tmp_path / "out/sessions")).to_pylist()
    assert summary.quarantined == {"duplicate_session": 2}
    assert len(kept) == 3
    assert {row["session_id"]: row["region"] for row in kept}["s0"] == "A"
    assert {e["file"] for e in storage.read_table(str(tmp_path / "out/quarantine.parquet")).to_pylist()} == {
        "1.parquet"
    }


def test_every_row_is_accounted_for_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [session(i, ts=ENTRY + timedelta(days=i % 9), history=[]) for i in range(60)]
    rows[7:9] = [session(5), session(8, clicks=[True])]
    write(tmp_path, table(*rows[:31]), table(*rows[31:]))
    log = Log(start="2026-01-11", end="2026-01-16", regions=["SG"])
    read: list[int] = []
    summary = run(tmp_path, log=log, on_rows=read.append)
    assert sum(read) == summary.rows == 60 == summary.outside + sum(summary.quarantined.values()) + summary.kept
    assert sum(summary.roles.values()) == summary.kept
    written = storage.read_table(str(tmp_path / "out/sessions")).to_pylist()
    assert {row["dt"] for row in written} == {f"2026-01-1{d}" for d in range(1, 7)}
    monkeypatch.setattr("rgalign_ray.logs.source.SourceFile.batches.__defaults__", (7,))
    again = run(tmp_path, log=log)
    assert again == summary
    assert storage.read_table(str(tmp_path / "out/sessions")).to_pylist() == written


@pytest.mark.parametrize("layout", ["dt={day}/region={region}", "dt={day}", "region={region}", "dt={compact}"])
def test_only_folders_of_the_days_and_regions_asked_for_are_opened(tmp_path: Path, layout: str) -> None:
    write(tmp_path)
    number = 0
    for day in range(4):
        for region in ("SG", "M Y"):
            entry = ENTRY + timedelta(days=day)
            named = {"day": entry.date(), "compact": f"{entry:%Y%m%d}", "region": quote(region)}
            folder = tmp_path / "source" / layout.format(**named)
            folder.mkdir(parents=True, exist_ok=True)
            row = session(number, ts=entry, region=region, history=[])
            pq.write_table(table(row), folder / f"{number}.parquet")
            number += 1
    summary = run(tmp_path, log=Log(start="2026-01-11", end="2026-01-12", regions=["M Y"]))
    assert sorted(storage.read_table(str(tmp_path / "out/sessions"))["session_id"].to_pylist()) == ["s3", "s5"]
    opened = {"dt={day}/region={region}": 2, "dt={day}": 4, "region={region}": 4, "dt={compact}": 8}[layout]
    assert (summary.files, summary.rows, summary.outside) == (opened, opened, opened - 2)


def test_a_file_in_a_folder_outside_is_not_even_checked(tmp_path: Path) -> None:
    write(tmp_path)
    for day in (10, 11):
        (tmp_path / f"source/dt=2026-01-{day}").mkdir()
    pq.write_table(SOUND, tmp_path / "source/dt=2026-01-10/a.parquet")
    (tmp_path / "source/dt=2026-01-11/b.parquet").write_bytes(b"damaged")
    assert run(tmp_path, log=Log(end="2026-01-10")).kept == 1
    with pytest.raises(DataError, match="no session has a day and region"):
        run(tmp_path, log=Log(end="2026-01-09"))


def test_days_and_regions_that_hold_nothing_are_said(tmp_path: Path) -> None:
    write(tmp_path, table(session(0)))
    with pytest.raises(DataError, match=r"no session has a day and region.*'MY'"):
        run(tmp_path, log=Log(regions=["MY"]))


def test_the_layout_is_by_day_and_region_and_partitions_of_the_source_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "dt=2026-01-10" / "region=M%20Y"
    folder.mkdir(parents=True)
    write(tmp_path)
    pq.write_table(table(session(0)).drop_columns(["region"]), folder / "a.parquet")
    by_region = SPEC.model_copy(update={"fields": (*SPEC.fields, FieldSpec(name="region", kind="categorical"))})
    run(tmp_path, feature_columns=by_region)
    files = storage.list_files(str(tmp_path / "out/sessions"))
    assert [Path(f).relative_to(tmp_path).as_posix() for f in files] == [
        "out/sessions/dt=2026-01-10/region=M%20Y/part-00000.parquet"
    ]
    assert storage.read_table(str(tmp_path / "out/sessions"))["region"].to_pylist() == ["M Y"]


@pytest.mark.parametrize("end", ["", "/", "?x=1/2"])
def test_a_log_behind_a_uri_is_read_and_written_as_one_in_a_folder(tmp_path: Path, end: str) -> None:
    place = tmp_path / "my log"
    folder = place / "source" / "dt=2026-01-10" / "region=M%20Y"
    folder.mkdir(parents=True)
    write(place)
    pq.write_table(table(session(0), session(0)).drop_columns(["region"]), folder / "a.parquet")
    uri = f"file://{tmp_path}/my%20log"
    ingest.ingest(
        f"{uri}/source{end}",
        f"{uri}/intents.parquet",
        None,
        f"{uri}/out{end}",
        Roles(test_days=0),
        rounds=1,
        log=Log(),
        feature_columns=SPEC,
    )
    (aside,) = storage.read_table(str(place / "out/quarantine.parquet")).to_pylist()
    assert (aside["file"], aside["reason"]) == ("dt=2026-01-10/region=M%20Y/a.parquet", "duplicate_session")
    assert (place / "out/sessions/dt=2026-01-10/region=M%20Y/part-00000.parquet").exists()
    assert storage.read_table(f"{uri}/out/sessions{end}")["region"].to_pylist() == ["M Y"]


def test_history_is_written_oldest_first_and_cut_to_the_newest(tmp_path: Path) -> None:
    write(tmp_path, table(session(0, history=[event("new", 1), event("old", 9), event("middle", 5)]), session(1)))
    summary = run(tmp_path, log=Log(history_length=2))
    first, second = storage.read_table(str(tmp_path / "out/sessions")).to_pylist()
    assert [e["event"] for e in first["history"]] == ["middle", "new"]
    assert [e["event"] for e in second["history"]] == ["order", "track"]
    assert summary.history_capped == 1


@pytest.mark.parametrize(
    ("test_days", "ahead", "told"), [(3, 7, False), (3, 8, True), (20, 20, False), (20, 21, True), (0, 99, False)]
)
def test_a_last_day_far_beyond_all_others_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], test_days: int, ahead: int, told: bool
) -> None:
    rows = [session(i, ts=ENTRY - timedelta(days=i), history=[]) for i in range(3)]
    write(tmp_path, table(*rows, session(3, ts=ENTRY + timedelta(days=ahead))))
    run(tmp_path, roles=Roles(test_days=test_days))
    last = str((ENTRY + timedelta(days=ahead)).date())
    said = capsys.readouterr().err
    assert (f"last day, {last}, is {ahead} days after 2026-01-10" in said) == told
    assert ("log.end=2026-01-10" in said) == told
    run(tmp_path, roles=Roles(test_days=test_days), log=Log(end="2026-01-10"))
    assert capsys.readouterr().err == ""


def test_the_feature_spec_says_how_long_a_history_is_unless_the_run_does(tmp_path: Path) -> None:
    assert Log().history_length is None
    write(tmp_path, table(session(0, history=[event("new", 1), event("old", 9), event("middle", 5)])))
    short = FeatureSpec(fields=SPEC.fields, history=HistorySpec(length=1), min_count=1)
    for asked, kept in ((None, 1), (2, 2)):
        assert run(tmp_path, log=Log(history_length=asked), feature_columns=short).history_capped == 1
        rows = storage.read_table(str(tmp_path / "out/sessions"))
        assert len(rows["history"][0]) == kept
        assert FeatureSpace.fit(short, [rows], asked).history_length == kept


@pytest.mark.parametrize(("name", "length"), [("shop", 20), ("movielens", 20), ("tau_retail", 20)])
def test_packaged_specs_read_the_histories_that_they_name(name: str, length: int) -> None:
    assert FeatureSpec.load(name).history_length(Log().history_length) == length


def test_counts_of_sessions_without_a_click_and_without_a_role(tmp_path: Path) -> None:
    rows = [session(i, ts=ENTRY - timedelta(days=i), history=[], clicks=[i > 0, False, False]) for i in range(12)]
    write(tmp_path, table(*rows))
    summary = run(tmp_path, roles=Roles(rank=0.5, align=0.5, valid=0, test=0, test_days=3))
    assert summary.without_click == 1
    assert summary.roles["none"] == 3
    assert summary.roles["rank"] + summary.roles["align_1"] == 9
    assert (summary.first_day, summary.last_day) == ("2025-12-30", "2026-01-10")


def test_further_columns_pass_and_other_arrow_types_of_the_same_values_are_read(tmp_path: Path) -> None:
    rows = table(session(0), session(1)).append_column("note", pa.array(["a", "b"]).dictionary_encode())
    zoned = rows["ts"].cast(pa.timestamp("ns", "UTC"))
    rows = rows.set_column(2, "ts", zoned).set_column(0, "session_id", rows["session_id"].cast(pa.large_string()))
    write(tmp_path, rows, table(session(2)))
    run(tmp_path)
    written = storage.read_table(str(tmp_path / "out/sessions"))
    assert written["note"].to_pylist() == ["a", "b", None]
    assert written["ts"].type == schema.TIMESTAMP
    assert written["ts"].to_pylist() == [ENTRY] * 3


def test_an_ingested_log_can_be_ingested_again(tmp_path: Path) -> None:
    write(tmp_path, table(*(session(i) for i in range(5))))
    run(tmp_path)
    first = storage.read_table(str(tmp_path / "out/sessions"))
    (tmp_path / "out").rename(tmp_path / "again")
    (tmp_path / "again/sessions").rename(tmp_path / "again/source")
    run(tmp_path / "again")
    assert storage.read_table(str(tmp_path / "again/out/sessions")).equals(first)
