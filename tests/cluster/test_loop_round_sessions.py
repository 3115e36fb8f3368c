"""A round's sessions, read from an ingested log as a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rgalign_ray import config, storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs import lists
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import log_stages, round_sessions
from rgalign_ray.loop.controller import execute
from rgalign_ray.loop.stage import Run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(config.load("smoke", [f"run_dir={tmp_path_factory.mktemp('run')}", "world.sessions=400"]))
    for stage in log_stages.stages(made.config):
        execute(made, stage, stage.name)
    return made


def clicked(run: Run, role: str) -> tuple[list[str], int]:
    """Ids of a role's sessions with a click, and how many have none."""
    table = storage.read_table(run.uri("sessions", "sessions"), columns=["session_id", "role", "clicks"])
    table = table.filter(np.array(table["role"].to_pylist()) == role)
    has = lists.any_true(table["clicks"])
    return sorted(np.array(table["session_id"].to_pylist())[has].tolist()), int((~has).sum())


def test_every_session_with_a_click_is_in_one_part(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_sessions, "PART_SESSIONS", 7)
    template = Template.load(run.config.prompt.template)
    expected, without = clicked(run, "align_1")
    for _ in range(2):  # what an interrupted try has left is written anew
        assert round_sessions.write(run, str(tmp_path), 1, [template]) == (len(expected), without)
        parts = dict(round_sessions.parts(str(tmp_path)))
        assert list(parts) == [f"{number:06d}" for number in range(len(parts))] and len(parts) > 2
        sizes = [part.num_rows for part in parts.values()]
        assert set(sizes[:-1]) == {7} and 1 <= sizes[-1] <= 7
        ids = [part["session_id"].to_pylist() for part in parts.values()]
        assert all(part == sorted(part) for part in ids)
        assert sorted(i for part in ids for i in part) == expected
        round_sessions.drop(str(tmp_path), expected[:2])


def test_the_control_of_the_leak_takes_no_more_than_are_fresh(run: Run, tmp_path: Path) -> None:
    template = Template.load(run.config.prompt.template)
    leak = Run(run.config.model_copy(update={"crossfit": 1}))
    there, _ = clicked(run, "rank")
    like = run.manifest("sessions").figures["roles"]["align_1"]
    written, _ = round_sessions.write(leak, str(tmp_path), 1, [template])
    ids = [i for _, part in round_sessions.parts(str(tmp_path)) for i in part["session_id"].to_pylist()]
    assert written == len(ids) == len(set(ids)) < len(there) and set(ids) <= set(there)
    share = len(there) / run.manifest("sessions").figures["roles"]["rank"]
    assert written == round(like * share)


def test_a_role_without_a_click_is_refused(run: Run, tmp_path: Path) -> None:
    template = Template.load(run.config.prompt.template)
    with pytest.raises(DataError, match=r"role align_7: no session with a click; raise roles\.align or"):
        round_sessions.write(run, str(tmp_path), 7, [template])
