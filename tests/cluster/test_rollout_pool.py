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

import numpy as np
import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.reasoner.engine import Group, Prompts, Sample
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, Unit

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

UNITS = [Unit([f"s{i}a", f"s{i}b"], [f"text {i} a", f"text {i} b"]) for i in range(8)]


@dataclass(frozen=True)
class FakeEngine:
    """Both the spec and the engine: it tells the seeds, and leaves a note of what it does in `notes`.

    `trouble` is what happens at the text of `at`: die, die once, raise, hang once, or fail to start.
    """

    notes: str
    trouble: str = ""
    at: str = "text 3 a"

    version = "fake-1"
    hidden_size = 2

    def start(self) -> FakeEngine:
        if self.trouble == "fail to start":
            raise ConfigError("reasoner.model: cannot load it.")
        return self

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], **sampling: float) -> list[Group]:
        first = prompts.texts[0]
        note = Path(self.notes) / f"{first}.{os.getpid()}.{time.monotonic_ns()}"
        note.touch()
        if self.trouble and first == self.at:
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
            raise ZeroDivisionError("a bug")

    def say(self, seed: int) -> Sample:
        return Sample(f"query {seed}", [seed % 97, 2], [-0.5, -0.25], "stop", seed, vector(seed))


def vector(seed: int) -> np.ndarray:
    return np.array([seed % 1009, 1], np.float16)


@contextmanager
def pool(folder: Path, out: str = "out", trouble: str = "", **changes: object) -> Iterator[RolloutPool]:
    """A pool of two workers that notes in `folder`/notes; `changes` are of the settings."""
    (folder / "notes").mkdir(exist_ok=True)
    settings = config.Rollout(**({"n": 2, "workers": 2, "in_flight_per_worker": 2} | changes))  # type: ignore[arg-type]
    made = RolloutPool(
        settings,
        {
            "engine": FakeEngine(str(folder / "notes"), trouble),
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


def test_a_worker_killed_in_the_middle_costs_no_unit_and_doubles_none(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die once") as made:
        finished = list(made.run(UNITS, "context"))
        assert made.deaths == 1
    assert sorted(finished) == sorted((unit.key("context"), 2) for unit in UNITS)
    assert contents(tmp_path) == contents(quiet)
    assert calls(tmp_path)["text 3 a"] == 2
    assert calls(tmp_path).total() <= len(UNITS) + 2, "only what the dead one had in hand"


def test_a_worker_that_hangs_past_its_deadline_is_replaced(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="hang once", deadline_s=10.0, retries=9) as made:
        finished = list(made.run(UNITS, "context"))
        assert made.deaths >= 1  # more where a busy machine takes that long to start a worker
    assert sorted(finished) == sorted((unit.key("context"), 2) for unit in UNITS)
    assert contents(tmp_path) == contents(quiet)


def test_more_deaths_than_retries_end_the_run_which_then_resumes(quiet: Path, tmp_path: Path) -> None:
    with pool(tmp_path, trouble="die", retries=1) as made:
        run = made.run(UNITS, "context")
        with pytest.raises(InfrastructureError, match=r"died .*death 2, with rollout\.retries = 1"):
            list(run)
    assert calls(tmp_path)["text 3 a"] == 2
    done = {Path(name).stem for name in contents(tmp_path) if name.startswith("/rollouts")}
    before = calls(tmp_path)
    assert UNITS[3].key("context") not in done
    with pool(tmp_path) as made:
        assert len(list(made.run(UNITS, "context"))) == len(UNITS)
    again = calls(tmp_path) - before
    assert set(again) == {unit.texts[0] for unit in UNITS if unit.key("context") not in done}
    assert contents(tmp_path) == contents(quiet)


def test_a_bug_ends_the_run_at_once_under_its_own_name(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="raise") as made:
        run = made.run(UNITS, "context")
        with pytest.raises(ZeroDivisionError, match="a bug"):
            list(run)
        assert made.deaths == 0
    assert calls(tmp_path)["text 3 a"] == 1


def test_a_worker_that_cannot_start_says_why_and_is_not_tried_again(tmp_path: Path) -> None:
    with pool(tmp_path, trouble="fail to start") as made:
        run = made.run(UNITS, "context")
        with pytest.raises(ActorDiedError, match=r"ConfigError.*reasoner\.model: cannot load it"):
            list(run)
        assert made.deaths == 0
    assert calls(tmp_path).total() == 0
