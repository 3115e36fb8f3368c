"""The pool loses no unit and doubles none, whichever worker dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, DataError, InfrastructureError
from rgalign_ray.ray_stacks import Place
from rgalign_ray.reasoner.engine import Group, Prompts, Sample
from rgalign_ray.rollout.pool import RolloutPool, _Member
from rgalign_ray.rollout.worker import Instruction, Unit

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

UNITS = [Unit([f"s{i}a", f"s{i}b"], [f"text {i} a", f"text {i} b"]) for i in range(8)]
FIRST, LAST = (UNITS[place].texts[0] for place in (0, -1))


@dataclass(frozen=True)
class FakeEngine:
    """Both the spec and the engine: it tells the seeds, and leaves a note of what it does in `notes`.

    `trouble` is what happens at the text of `at`: die, die once, raise, hang once, or fail to start. `die everywhere`
    minds no text, and `four starts fail` ends the first workers as they start. `company`: the first text waits for a
    second worker to have one, the last for its end.
    """

    notes: str
    trouble: str = ""
    at: str = "text 3 a"

    version = "fake-1"
    hidden_size = 2

    def start(self) -> FakeEngine:
        if self.trouble == "fail to start":
            raise ConfigError("reasoner.model: cannot load it.")
        started = Path(self.notes) / "starts"
        if self.trouble == "four starts fail" and (not started.exists() or started.stat().st_size < 4):
            with started.open("a") as note:
                note.write(".")
            os.kill(os.getpid(), signal.SIGKILL)
        return self

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        first = prompts.texts[0]
        note = Path(self.notes) / f"{first}.{os.getpid()}.{time.monotonic_ns()}"
        note.touch()
        if self.trouble == "company":
            self.wait_for_company(first)
        elif self.trouble and (first == self.at or self.trouble == "die everywhere"):
            self.misbehave()
        return [Group([1], vector(row[0]), [self.say(seed) for seed in row]) for row in seeds]

    def misbehave(self) -> None:
        flag = Path(self.notes) / "once"
        if "once" in self.trouble and flag.exists():
            return
        flag.touch()
        if "die" in self.trouble:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in self.trouble:
            time.sleep(600)
        if "raise" in self.trouble:
            print("beside the bug", file=sys.stderr)
            raise ZeroDivisionError("a bug")

    def wait_for_company(self, text: str) -> None:
        def others() -> set[int]:
            return {int(note.name.split(".")[1]) for note in Path(self.notes).iterdir()} - {os.getpid()}

        until = time.monotonic() + 120
        while (text == FIRST and not others()) or (text == LAST and any(map(psutil.pid_exists, others()))):
            assert time.monotonic() < until
            time.sleep(0.05)

    def say(self, seed: int) -> Sample:
        return Sample(f"query {seed}", [seed % 97, 2], [-0.5, -0.25], "stop", seed, vector(seed))


def vector(seed: int) -> np.ndarray:
    return np.array([seed % 1009, 1], np.float16)


@contextmanager
def pool(
    folder: Path, out: str = "out", trouble: str = "", at: str = "text 3 a", **changes: object
) -> Iterator[RolloutPool]:
    """A pool of two workers that notes in `folder`/notes; `changes` are of the settings."""
    (folder / "notes").mkdir(exist_ok=True)
    settings = config.Rollout(**({"n": 2, "workers": 2, "in_flight_per_worker": 2} | changes))  # type: ignore[arg-type]
    made = RolloutPool(
        settings,
        {
            "engine": FakeEngine(str(folder / "notes"), trouble, at),
            "instruction": Instruction("", "", "v1"),
            "settings": settings,
            "run_seed": 3,
            "round_": 1,
            "out_uri": str(folder / out),
        },
    )
    try:
        yield made
    finally:
        made.close()


def calls(folder: Path) -> Counter[str]:
    """How often each unit was sampled, by its first text."""
    return Counter(path.name.split(".")[0] for path in (folder / "notes").iterdir() if path.name != "once")


def contents(folder: Path, out: str = "out") -> dict[str, bytes]:
    root = str(folder / out)
    return {uri.removeprefix(root): Path(uri).read_bytes() for uri in storage.list_files(root)}


@pytest.fixture(scope="module")
def quiet(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing happens."""
    folder = tmp_path_factory.mktemp("quiet")
    with pool(folder) as made:
        finished = list(made.run(UNITS, "context"))
    assert sorted(finished) == sorted((unit.key("context"), 2) for unit in UNITS)
    assert made.deaths == 0
    return folder


def test_every_unit_is_sampled_once_and_written(quiet: Path) -> None:
    assert calls(quiet) == {unit.texts[0]: 1 for unit in UNITS}
    keys = [unit.key("context") for unit in UNITS]
    assert set(contents(quiet)) == {f"/{kind}/{key}.parquet" for kind in ("rollouts", "embeddings") for key in keys}
    table = storage.read_table(str(quiet / "out/rollouts"))
    found = Counter((row["session_id"], row["sample"]) for row in table.to_pylist())
    assert found == {(session, n): 1 for unit in UNITS for session in unit.session_ids for n in range(2)}


def test_a_second_run_samples_nothing_and_another_context_everything(quiet: Path) -> None:
    before, wholes = calls(quiet), contents(quiet)
    with pool(quiet) as made:
        assert sorted(made.run(UNITS, "context")) == sorted((unit.key("context"), 2) for unit in UNITS)
        assert calls(quiet) == before
    with pool(quiet, "other") as made:
        assert len(list(made.run(UNITS[:2], "other weights"))) == 2
        assert calls(quiet).total() == before.total() + 2
    assert contents(quiet) == wholes


@pytest.mark.fault
def test_a_worker_killed_in_the_middle_costs_no_unit_and_doubles_none(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die once") as made:
        finished = list(made.run(UNITS, "context"))
        assert made.deaths == 1
    assert sorted(finished) == sorted((unit.key("context"), 2) for unit in UNITS)
    assert contents(tmp_path) == contents(quiet)
    assert calls(tmp_path)["text 3 a"] == 2
    assert calls(tmp_path).total() <= len(UNITS) + 2, "only what the dead one had in hand"


@pytest.mark.fault
def test_a_worker_that_the_memory_monitor_kills_has_died(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tells of it by an error that is not the one of an actor's death."""
    get = ray.get

    def told(*args: Any, **options: Any) -> Any:
        try:
            return get(*args, **options)
        except RayActorError:
            raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.") from None

    monkeypatch.setattr("rgalign_ray.rollout.pool.ray.get", told)
    with pool(tmp_path, trouble="die", retries=1) as made:
        list(made.run(UNITS, "context"))
        assert made.quarantined == ["s3a"] and made.deaths == 3
    [row] = storage.read_table(str(tmp_path / "out/quarantine")).to_pylist()
    assert "died (1 worker(s) were killed due to the node running low on memory.)" in row["reason"]


@pytest.mark.fault
def test_a_worker_that_hangs_past_its_deadline_is_replaced(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="hang once", deadline_s=20.0) as made:
        finished = list(made.run(UNITS, "context"))
        assert made.deaths == 1
    assert sorted(finished) == sorted((unit.key("context"), 2) for unit in UNITS)
    found = contents(tmp_path)
    stacks = found.pop(f"/stacks/{UNITS[3].key('context')}.txt")
    assert b"in misbehave" in stacks, "what it was at is told"
    assert found == contents(quiet)


@pytest.mark.fault
def test_workers_that_die_one_after_the_other_as_they_start_are_one_loss(quiet: Path, tmp_path: Path) -> None:
    """As on a node that has died, until Ray has noticed."""
    with pool(tmp_path, trouble="four starts fail", retries=1) as made:
        assert len(list(made.run(UNITS, "context"))) == len(UNITS)
        assert made.deaths >= 4
    assert contents(tmp_path) == contents(quiet)


@pytest.mark.fault
@pytest.mark.parametrize(("nodes", "losses"), [("aaaa", 1), ("abab", 4), ("a aa", 1), ("ab b", 2)])
def test_what_a_node_takes_with_it_is_one_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, losses: int
) -> None:
    """A blank is a worker that had not told its node."""
    now = 1000.0
    monkeypatch.setattr("rgalign_ray.rollout.pool.time.monotonic", lambda: now)
    with pool(tmp_path) as made:
        lost = [_Member(None, None, 0.0, place=Place(node.strip())) for node in nodes]
        assert sum(not made._with_its_node(member) for member in lost) == losses
        now += 61.0
        assert not made._with_its_node(lost[-1]), "another minute, another loss"


@pytest.mark.fault
def test_more_losses_than_retries_end_the_run_which_then_resumes(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die everywhere", retries=1) as made:
        run = made.run(UNITS, "context")
        with pytest.raises(InfrastructureError, match=r"died .*loss 2, with rollout\.retries = 1"):
            list(run)
    assert not contents(tmp_path)
    with pool(tmp_path, trouble="die once") as made:
        run = made.run(UNITS, "context")
        done = {next(run)[0] for _ in range(3)}
    before = calls(tmp_path)
    with pool(tmp_path) as made:
        assert len(list(made.run(UNITS, "context"))) == len(UNITS)
    again = calls(tmp_path) - before
    assert not set(again) & {unit.texts[0] for unit in UNITS if unit.key("context") in done}
    assert contents(tmp_path) == contents(quiet)


def test_a_session_that_ends_every_worker_is_set_aside_and_all_others_are_done(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die", retries=1) as made:
        finished = list(made.run(UNITS, "context"))
        assert made.quarantined == ["s3a"] and made.deaths == 3
    alone, other = UNITS[3].singly()
    others = [(unit.key("context"), 2) for unit in UNITS if unit is not UNITS[3]]
    assert sorted(finished) == sorted([*others, (alone.key("context"), 1), (other.key("context"), 1)])
    found, expected = contents(tmp_path), contents(quiet)
    assert {name: found[name] for name in found if name in expected} == {
        name: expected[name] for name in expected if UNITS[3].key("context") not in name
    }
    sessions = storage.read_table(str(tmp_path / "out/rollouts"), columns=["session_id"])["session_id"].to_pylist()
    assert Counter(sessions) == {i: 2 for unit in UNITS for i in unit.session_ids if i != "s3a"}
    [row] = storage.read_table(str(tmp_path / "out/quarantine")).to_pylist()
    assert row["session_id"] == "s3a" and row["text"] == "text 3 a" and "died" in row["reason"]


def test_a_unit_that_an_earlier_try_has_cut_is_there_once(quiet: Path, tmp_path: Path) -> None:
    parts = [part.key("context") for part in UNITS[3].singly()]
    with pool(tmp_path, trouble="die") as made:
        for key, _ in made.run(UNITS, "context"):
            if key in parts and storage.exists(str(tmp_path / f"out/rollouts/{key}.parquet")):
                break  # the driver dies
    with pool(tmp_path) as made:
        list(made.run(UNITS, "context"))
        assert not made.quarantined
    assert contents(tmp_path) == contents(quiet)


def test_a_session_that_comes_first_does_not_keep_the_others_from_being_done(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die", at=FIRST, workers=1, in_flight_per_worker=1) as made:
        finished = list(made.run(UNITS, "context"))
        assert made.quarantined == ["s0a"] and made.deaths == 4
    parts = [(unit.key("context"), 1) for unit in UNITS[0].singly()]
    assert sorted(finished) == sorted([*parts, *((unit.key("context"), 2) for unit in UNITS[1:])])


def test_what_an_earlier_run_has_done_shows_that_workers_can_work(tmp_path: Path) -> None:
    with pool(tmp_path) as made:
        assert len(list(made.run(UNITS[1:], "context"))) == len(UNITS) - 1
    with pool(tmp_path, trouble="die", at=FIRST, workers=1) as made:
        list(made.run([*UNITS[1:], UNITS[0]], "context"))
        assert made.quarantined == ["s0a"] and made.deaths == 3


def test_too_many_sessions_set_aside_end_the_run(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die", quarantine=0) as made:
        run = made.run(UNITS, "context")
        with pytest.raises(DataError, match=r"1 sessions end every worker .*rollout\.quarantine = 0.*/quarantine"):
            list(run)


def test_the_pool_grows_with_its_queue_as_far_as_the_cluster_has_room_and_shrinks(tmp_path: Path) -> None:
    """Of two CPUs one stays free, so that there is room for two of the eight workers of half a CPU."""
    with pool(tmp_path, trouble="company", min_workers=1, workers=8, in_flight_per_worker=1, idle_s=0.5) as made:
        sizes = [made.size for _ in made.run(UNITS, "context")]
    assert max(sizes) == 2
    assert sizes[-1] == 1, "while the last unit took its time, the other worker had nothing to do"


def test_the_source_is_read_no_further_than_there_is_room(tmp_path: Path) -> None:
    pulled = []

    def source() -> Iterator[Unit]:
        for number in range(200):
            pulled.append(number)
            yield Unit([f"s{number}"], [f"text {number}"])

    with pool(tmp_path) as made:
        for finished, _ in enumerate(made.run(source(), "context"), 1):
            assert len(pulled) <= finished + 2 * 2 * 2 + 1, "two workers, two units each in hand and as many waiting"
            if finished == 40:
                break


def test_a_bug_ends_the_run_at_once_under_its_own_name(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="raise") as made:
        run = made.run(UNITS, "context")
        with pytest.raises(ZeroDivisionError, match="a bug") as error:
            list(run)
        assert made.deaths == 0
    assert calls(tmp_path)["text 3 a"] == 1
    assert error.value.__notes__ == ["The last lines of the worker's log:\nbeside the bug"]


def test_a_worker_that_cannot_start_says_why_and_is_not_tried_again(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="fail to start") as made:
        run = made.run(UNITS, "context")
        with pytest.raises(ActorDiedError, match=r"ConfigError.*reasoner\.model: cannot load it"):
            list(run)
        assert made.deaths == 0
    assert calls(tmp_path).total() == 0
