"""What a stage takes up: its own records of training, and artefacts that its key stands for."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from rgalign_ray import config, storage
from rgalign_ray.loop import controller
from rgalign_ray.loop.rank_stages import reading_stages
from rgalign_ray.loop.stage import RECORDS, Outcome, Run, Stage

READINGS: list[dict[str, object]] = [
    {"rollout": {"temperature": 1.0}},
    {"rollout": {"top_p": 0.5}},
    {"rollout": {"max_new_tokens": 8}},
    {"encode": {"query_share": 0.5}},
    {"evaluate": {"readout": "query"}},
    {"evaluate": {"examples": 7}},
    {"early_stop": True, "roles": {"rank": 0.5, "audit": 0.1}},
]
"""Changes for each of which sessions have to be read anew."""


class Training:
    """A stage that dies once in the middle; `found` is what each try found."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def __call__(self, run: Run, out: str) -> Outcome:
        state = storage.join(run.records, "state")
        self.found.append(storage.exists(state))
        storage.write_bytes(state, b"half")
        if len(self.found) == 1:
            raise InterruptedError
        return Outcome()


def test_a_try_goes_on_from_the_records_of_the_last(tmp_path: Path) -> None:
    training = Training()
    job = Run(config.validate({"run_dir": str(tmp_path)}))
    stage = Stage("training", "learn", training, ("seed",), ())
    with pytest.raises(InterruptedError):
        controller.run_stages(job, [stage])
    controller.run_stages(job, [stage])
    assert training.found == [False, True]
    assert not list((tmp_path / RECORDS).iterdir()), "nothing is left when all is done"


def test_records_of_other_settings_are_not_taken_up(tmp_path: Path) -> None:
    training = Training()
    stage = Stage("training", "learn", training, ("seed",), ())
    with pytest.raises(InterruptedError):
        controller.run_stages(Run(config.validate({"run_dir": str(tmp_path)})), [stage])
    controller.run_stages(Run(config.validate({"run_dir": str(tmp_path), "seed": 1})), [stage])
    assert training.found == [False, False]
    assert not list((tmp_path / RECORDS).iterdir())


def test_a_stage_leaves_the_records_of_one_that_runs_beside_it(tmp_path: Path) -> None:
    job = Run(config.validate({"run_dir": str(tmp_path)}))
    storage.write_bytes(job.uri(RECORDS, "of-another", "state"), b"")
    controller.execute(job, Stage("short", "learn", lambda run, out: Outcome(), (), ()), "its-key")
    assert storage.exists(job.uri(RECORDS, "of-another", "state"))


def test_where_workers_run_and_how_often_they_may_die_decides_no_key(tmp_path: Path) -> None:
    sections = ("rollout", "encode", "ranker", "reward", "learner")
    stage = Stage("any", "do", lambda run, out: Outcome(), sections, ())

    def key(**settings: object) -> str:
        return controller.stage_key(Run(config.validate({"run_dir": str(tmp_path), **settings})), stage)

    bound = {"node_labels": {"rgalign": "here"}}
    assert key(**dict.fromkeys(sections, bound)) == key()
    assert key(ranker={"retries": 9}, learner={"retries": 9}) == key()
    more_of_them = {"workers": 4, "cpus_per_worker": 1, "gpus_per_worker": 1}
    assert key(rollout=more_of_them | {"min_workers": 1, "deadline_s": 9}, encode=more_of_them) == key()
    assert key(reward={"cpus": 2}) == key()
    assert key(rollout={"n": 8}) != key() != key(encode={"batch_size": 8})
    assert key(learner=bound | {"micro_batch": 2}) != key()


@pytest.mark.parametrize("place", ["reasoner.model", "compare.encoder.model"])
def test_a_folder_that_gets_another_model_decides_keys(tmp_path: Path, place: str) -> None:
    stage = Stage("any", "do", lambda run, out: Outcome(), (place,), ())
    file = tmp_path / "model/model.safetensors"
    section, name = place.rsplit(".", 1)
    chosen: dict[str, Any] = {name: str(file.parent)}
    for part in reversed(section.split(".")):
        chosen = {part: chosen}
    keys = []
    for weights in (b"one", b"two", b"one"):
        storage.write_bytes(str(file), weights)
        keys.append(controller.stage_key(Run(config.validate({"run_dir": str(tmp_path), **chosen})), stage))
    assert keys[0] == keys[2] != keys[1]


def test_what_has_changed_outside_since_is_told_and_redoes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def make(run: Run, out: str) -> Outcome:
        made.append(out)
        return Outcome()

    stage = Stage("once", "do", make, (), (), changed=lambda run: "it has grown")
    for _ in range(2):
        controller.run_stages(Run(config.validate({"run_dir": str(tmp_path)})), [stage])
    assert len(made) == 1 and capsys.readouterr().err.count("it has grown") == 1


def test_sessions_are_read_again_for_what_changes_the_reading_alone(tmp_path: Path) -> None:
    def key(**settings: object) -> str:
        changed = config.validate({"run_dir": str(tmp_path), **settings})
        (reading,) = [stage for stage in reading_stages(changed, 0) if stage.name == "embeddings_0"]
        return controller.stage_key(Run(changed), replace(reading, inputs=()))

    assert key(rollout={"n": 8, "unit_sessions": 4}) == key()
    assert key(evaluate={"bootstrap": 2000, "k": 5, "confidence": 0.9}) == key()
    assert len({key(), *(key(**changes) for changes in READINGS)}) == 1 + len(READINGS)


def test_a_change_of_one_stage_is_one_of_all_that_read_it(tmp_path: Path) -> None:
    made: list[str] = []

    def stage(name: str, settings: tuple[str, ...], inputs: tuple[str, ...]) -> Stage:
        def make(run: Run, out: str) -> Outcome:
            made.append(name)
            return Outcome()

        return Stage(name, "do", make, settings, inputs)

    sequence = [stage("first", ("rollout.n",), ()), stage("beside", (), ()), stage("second", (), ("first",))]
    sequence.append(stage("third", (), ("second", "beside")))
    for n in (4, 4, 8):
        controller.run_stages(Run(config.validate({"run_dir": str(tmp_path), "rollout": {"n": n}})), sequence)
    assert made == ["first", "beside", "second", "third", "first", "second", "third"]


@pytest.mark.parametrize(("place", "packaged"), [("prompt.template", "prompts"), ("features.spec", "features")])
def test_a_file_that_changes_under_its_name_decides_keys(tmp_path: Path, place: str, packaged: str) -> None:
    file = tmp_path / "mine.yaml"
    section, name = place.split(".")
    job = Run(config.validate({"run_dir": str(tmp_path), section: {name: str(file)}}))
    shop = yaml.safe_load(resources.files("rgalign_ray").joinpath("configs", packaged, "shop.yaml").read_text())
    keys = []
    for change in ({}, {}, {"min_count": 7} if section == "features" else {"item": "x"}):
        file.write_text(yaml.safe_dump(shop | change))
        keys.append(controller.stage_key(job, Stage("any", "do", lambda run, out: Outcome(), (section,), ())))
    assert keys[0] == keys[1] != keys[2]
