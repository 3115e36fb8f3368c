"""A round in parts: nothing is lost between them, and what is chosen does not depend on where they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from learner_data import INTENTS, SESSIONS, WORDS, sessions

from rgalign_ray import config, schema, storage
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import align_stages, round_sessions
from rgalign_ray.loop.judge_stages import SCORED, with_proposals
from rgalign_ray.loop.stage import Run
from rgalign_ray.rollout.worker import Proposed

N = 4
CLICKED = [INTENTS[i % len(INTENTS)] for i in range(SESSIONS)]


def write_round(run: Run, cuts: Sequence[int]) -> None:
    """Rollouts and rewards of `SESSIONS` sessions, in parts that end before the places `cuts`."""
    knowledge = [{"intent_id": i, "title": f"about {i}", "description": i, "category": "c"} for i in INTENTS]
    storage.write_table(run.uri("sessions", "intents.parquet"), pa.Table.from_pylist(knowledge, schema=schema.INTENTS))
    table = sessions(CLICKED)
    draw = np.random.default_rng(4)
    rewards = draw.normal(size=(SESSIONS, N)).astype(np.float32)
    rewards[draw.random(rewards.shape) < 0.2] = np.nan
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, SESSIONS], strict=True)):
        part = f"{number:06d}"
        own = table.slice(start, stop - start)
        storage.write_table(run.uri("rollouts_1", round_sessions.FOLDER, f"{part}.parquet"), own)
        for unit in (slice(1, None, 2), slice(0, None, 2)):  # a part's units lie apart from its order
            ids = own["session_id"].to_pylist()[unit]
            rows = [(i, n) for i in ids for n in range(N)]
            reward = [float(rewards[int(i[1:]), n]) for i, n in rows]
            rollouts = [
                {
                    "session_id": i,
                    "sample": n,
                    "source": f"source {n}",
                    "query": f"query {n} of {i}",
                    "prompt_ids": [int(i[1:])],
                    "completion_ids": [n, 2],
                }
                for i, n in rows
            ]
            scored = [
                {"session_id": i, "sample": n, "reward": value, "uplift": value + 0.1}
                for (i, n), value in zip(rows, reward, strict=True)
            ]
            name = f"{part}-{unit.start}.parquet"
            made = pa.Table.from_pylist(rollouts, schema=schema.ROLLOUTS)
            storage.write_table(run.uri("rollouts_1", "rollouts", name), made)
            judged = pa.Table.from_pylist(scored, schema=schema.SCORED)
            storage.write_table(run.uri("rewards_1", SCORED, name), judged)


def run_in(folder: Path | str, **select: object) -> Run:
    settings = config.load("smoke", [f"run_dir={folder}"])
    return Run(settings.model_copy(update={"select": config.Select.model_validate(select)}))


@pytest.mark.parametrize(
    "chosen",
    [{}, {"method": "soft"}, {"method": "random", "n": 2}, {"weight": "uplift"}, {"method": "title"}],
    ids=str,
)
def test_what_is_chosen_does_not_depend_on_the_parts(tmp_path: Path, chosen: dict[str, object]) -> None:
    whole, parts = run_in(tmp_path / "whole", **chosen), run_in(tmp_path / "parts", **chosen)
    write_round(whole, [])
    write_round(parts, [5, 6, 21])
    outcomes = [
        align_stages.choose(run, str(tmp_path / f"{name}-out"), 1) for name, run in (("w", whole), ("p", parts))
    ]
    assert outcomes[0] == outcomes[1] and outcomes[0].rows["sessions"] == SESSIONS
    for folder in ("selected", "pairs", "positives"):
        one, several = (storage.read_table(str(tmp_path / f"{name}-out/{folder}")) for name in "wp")
        assert len(storage.list_files(str(tmp_path / f"p-out/{folder}"))) == 4
        assert several.equals(one)
        assert one.num_rows or (folder == "pairs" and chosen.get("method") == "title")
    positives = storage.read_table(str(tmp_path / "p-out/positives"))
    assert positives["session_id"].to_pylist() == [f"s{i:03d}" for i in range(SESSIONS)]
    assert positives["positives"].to_pylist() == [[INTENTS.index(intent)] for intent in CLICKED]
    assert positives["prompt_ids"].to_pylist() == [[i] for i in range(SESSIONS)]


def test_what_is_worth_more_than_no_query_teaches_more_often(tmp_path: Path) -> None:
    run = run_in(tmp_path, weight="uplift")
    write_round(run, [5, 21])
    align_stages.choose(run, str(tmp_path / "out"), 1)
    scored = storage.read_table(run.uri("rewards_1", SCORED)).sort_by(
        [("session_id", "ascending"), ("sample", "ascending")]
    )
    reward, uplift = (scored[name].to_numpy().reshape(SESSIONS, N) for name in ("reward", "uplift"))
    chosen = np.take_along_axis(uplift, np.nanargmax(reward, axis=1)[:, None], axis=1)[:, 0].clip(0)
    taught = storage.read_table(str(tmp_path / "out/selected"))["session_id"].to_pylist()
    counts = np.array([taught.count(f"s{number:03d}") for number in range(SESSIONS)])
    assert counts.sum() == SESSIONS and counts.max() > 1 and counts.min() == 0
    assert np.all(np.abs(counts - chosen / chosen.sum() * SESSIONS) < 1 + 1e-5), "in proportion, up to rounding"


def test_the_best_query_teaches_and_is_set_against_the_worst(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_round(run, [5, 21])
    align_stages.choose(run, str(tmp_path / "out"), 1)
    scored = storage.read_table(run.uri("rewards_1", SCORED)).sort_by(
        [("session_id", "ascending"), ("sample", "ascending")]
    )
    rewards = scored["reward"].to_numpy().reshape(SESSIONS, N)
    best, worst = np.nanargmax(rewards, axis=1), np.nanargmin(rewards, axis=1)
    gaps = np.nanmax(rewards, axis=1) - np.nanmin(rewards, axis=1)
    chosen = {row["session_id"]: row for row in storage.read_table(str(tmp_path / "out/selected")).to_pylist()}
    paired = {row["session_id"]: row for row in storage.read_table(str(tmp_path / "out/pairs")).to_pylist()}
    read = {row["session_id"]: row for row in storage.read_table(str(tmp_path / "out/positives")).to_pylist()}
    assert len(chosen) == SESSIONS and len(paired) == (gaps > 0).sum()
    for number in range(SESSIONS):
        session = f"s{number:03d}"
        assert chosen[session]["query"] == f"query {best[number]} of {session}" and chosen[session]["rank"] == 0
        assert chosen[session]["completion_ids"] == read[session]["completion_ids"] == [best[number], 2]
        if gaps[number] > 0:
            pair = paired[session]
            assert (pair["chosen_ids"], pair["rejected_ids"]) == ([best[number], 2], [worst[number], 2])
            assert pair["gap"] == pytest.approx(gaps[number])


def test_units_are_named_after_their_part_and_hold_every_session_once(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_round(run, [10, 20])
    (tmp_path / "words.yaml").write_text(
        'version: w\nprefix: ""\nsession: "{{ word }}"\nsuffix: ""\nitem: "{{ title }}"\n'
    )
    template = Template.load(str(tmp_path / "words.yaml"))
    units = list(round_sessions.units(run.uri("rollouts_1"), template, 4))
    assert [unit.part for unit in units] == ["000000"] * 3 + ["000001"] * 3 + ["000002"] * 3
    assert sorted(i for unit in units for i in unit.session_ids) == [f"s{i:03d}" for i in range(SESSIONS)]
    for unit in units:
        assert unit.key("context").startswith(f"{unit.part}-")
        assert unit.texts == [WORDS[int(i[1:]) % len(WORDS)] for i in unit.session_ids]
        assert [single.key("context")[:7] for single in unit.singly()] == [f"{unit.part}-"] * len(unit.texts)


@pytest.mark.parametrize("place", ["{}", "file://{}/", "file://{}?x=1/2-3"])
def test_judged_units_come_with_their_own_sessions(tmp_path: Path, place: str) -> None:
    run = run_in(place.format(tmp_path))
    write_round(run, [7])
    seen = []
    for rows, file, embeddings in round_sessions.sampled_units(run.uri("rollouts_1")):
        ids = rows["session_id"].to_pylist()
        assert ids == sorted(set(storage.read_table(file)["session_id"].to_pylist()))
        assert embeddings == file.replace("/rollouts/", "/embeddings/")
        seen += ids
    assert sorted(seen) == [f"s{i:03d}" for i in range(SESSIONS)]


def test_sessions_that_were_set_aside_leave_their_parts(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_round(run, [7])
    round_sessions.drop(run.uri("rollouts_1"), ["s003", "s030"])
    left = {name: part["session_id"].to_pylist() for name, part in round_sessions.parts(run.uri("rollouts_1"))}
    assert len(left["000000"]) == 6 and "s003" not in left["000000"]
    assert len(left["000001"]) == SESSIONS - 7 - 1 and "s030" not in left["000001"]


def test_a_session_without_proposals_gets_as_many_that_were_not_asked_for(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_round(run, [7])
    teacher = config.Teacher(name="other", n=2)
    settings = run.config.model_copy(update={"teachers": [teacher]})
    template = Template.load("shop")
    out = run.uri("rollouts_1")
    for part, ids in (("000000", range(7)), ("000001", range(7, SESSIONS))):
        rows = [
            {"session_id": f"s{i:03d}", "query": f"{i} {n}", "finish": "stop"} for i in ids if i != 3 for n in range(2)
        ]
        table = pa.Table.from_pylist(rows, schema=schema.PROPOSALS)
        storage.write_table(f"{out}/proposals/other/proposals/{part}-a.parquet", table)
    (tmp_path / "words.yaml").write_text(
        'version: w\nprefix: ""\nsession: "{{ word }}"\nsuffix: ""\nitem: "{{ title }}"\n'
    )
    units = round_sessions.units(out, Template.load(str(tmp_path / "words.yaml")), 4)
    found: dict[str, list[Proposed]] = {}
    for unit in with_proposals(units, out, settings, {"other": template}):
        assert unit.proposed is not None
        found |= dict(zip(unit.session_ids, unit.proposed, strict=True))
    assert [one.query for one in found["s003"]] == [None, None]
    assert [one.query for one in found["s012"]] == ["12 0", "12 1"]
    assert {one.source for row in found.values() for one in row} == {"other"}
