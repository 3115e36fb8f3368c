from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from logs_data import INTENTS, SCHEMA, event, run, session, table, write

from rgalign_ray import storage
from rgalign_ray.config import Roles
from rgalign_ray.errors import DataError
from rgalign_ray.logs import cold
from rgalign_ray.logs.roles import role_of

IDS = [f"intent_{i:03d}" for i in range(200)]
THIRD = Roles(test_days=0, cold_share=1 / 3)
"""Of the three intents of `logs_data`: one."""


def the_cold_one() -> str:
    (only,) = cold.cold_intents(INTENTS["intent_id"].to_pylist(), THIRD).to_pylist()
    return only


def test_the_share_is_exact_and_the_draw_is_by_id_and_seed() -> None:
    drawn = cold.cold_intents(IDS, Roles(cold_share=0.3)).to_pylist()
    assert len(drawn) == len(set(drawn)) == 60
    assert sorted(cold.cold_intents(IDS[::-1], Roles(cold_share=0.3)).to_pylist()) == sorted(drawn)
    assert set(drawn) < set(cold.cold_intents(IDS, Roles(cold_share=0.5)).to_pylist()), "a larger share adds to it"
    other = cold.cold_intents(IDS, Roles(cold_share=0.3, seed=1)).to_pylist()
    assert 5 < len(set(other) & set(drawn)) < 35
    assert not len(cold.cold_intents(IDS, Roles()))


def test_training_loses_cold_candidates_and_events_and_test_keeps_nothing_but_them() -> None:
    held_back = pa.array(["b", "c"])
    rows = [
        session(
            number,
            candidates=["a", "b", "c", "d"],
            shown=[True, True, False, True],
            clicks=[False, True, False, True],
            history=[event("b", 3), event("a", 2)],
            position=position,
        )
        for number, position in enumerate([[0, 1, None, 2], None, [3, 2, 1, 0]])
    ]
    columns = SCHEMA.append(pa.field("position", pa.list_(pa.int16())))
    left, role = cold.withhold(table(*rows, columns=columns), np.array(["rank", "test", "test"]), held_back)
    assert role.tolist() == ["rank", "test", "test"]
    trained, first, second = left.to_pylist()
    assert (trained["candidates"], trained["shown"], trained["clicks"]) == (["a", "d"], [True, True], [False, True])
    assert trained["position"] == [0, 2]
    assert [e["event"] for e in trained["history"]] == ["a"]
    assert (first["candidates"], first["shown"], first["clicks"]) == (["b", "c"], [True, False], [True, False])
    assert first["position"] is None and second["position"] == [2, 1]
    assert [e["event"] for e in first["history"]] == ["b", "a"]
    assert trained["days_late"] == 7.0


@pytest.mark.parametrize(
    ("held_back", "expected"),
    [(["c"], ["rank", "none"]), (["b", "c"], ["none", "test"]), ([], ["rank", "none"]), (["x"], ["rank", "none"])],
)
def test_sessions_with_fewer_than_two_candidates_left_have_no_role(held_back: list[str], expected: list[str]) -> None:
    rows = [session(number, candidates=["a", "b", "c"]) for number in range(2)]
    _, role = cold.withhold(table(*rows), np.array(["rank", "test"]), pa.array(held_back, pa.string()))
    assert role.tolist() == expected


def test_an_ingested_log_has_cold_intents_in_test_sessions_alone(tmp_path: Path) -> None:
    one = the_cold_one()
    write(tmp_path, table(*(session(n, history=[event(one, 5), event("track", 2)]) for n in range(60))))
    summary = run(tmp_path, roles=THIRD)
    assert summary.cold_intents == 1
    sessions = storage.read_table(str(tmp_path / "out/sessions")).to_pylist()
    users = [row["user_id"] for row in sessions]
    by_user = role_of(users, np.array([row["ts"] for row in sessions]), THIRD, 1, np.datetime64("2026-01-10"))
    assert {"rank", "test"} < set(by_user)
    for row, role in zip(sessions, by_user, strict=True):
        events = [e["event"] for e in row["history"]]
        if role == "test":
            assert row["role"] == "none", "one candidate is nothing to rank"
            assert row["candidates"] == [one] and events == [one, "track"]
        else:
            assert row["role"] == role
            assert one not in row["candidates"] and len(row["candidates"]) == 2 and events == ["track"]
    assert storage.read_table(str(tmp_path / "out/intents.parquet")).num_rows == 3


def test_logs_of_candidate_sets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    columns = pa.schema([f for f in SCHEMA if f.name != "candidates"]).append(pa.field("candidate_set", pa.string()))
    write(tmp_path, table(session(candidate_set="all"), columns=columns))
    with pytest.raises(DataError, match=r"candidate sets; roles\.cold_share needs a list"):
        run(tmp_path, roles=THIRD)
    assert not (tmp_path / "out").exists()
