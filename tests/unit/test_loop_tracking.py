"""What trackers are told of a run, and that none of them can end it."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.loop import controller, tracking
from rgalign_ray.loop.tracking import Point, Tracker

MANIFEST = storage.Manifest(
    stage="align_1_sft",
    key="k1",
    rows={"steps": 2},
    figures={"loss": [1.5, float("nan"), 1.0], "gate": {"audit": 0.25, "note": "text", "held": True}, "none": None},
    seconds=3.5,
    peak_memory_mb=100.0,
)


def settings(folder: Path, **more: Any) -> config.Config:
    return config.validate({"run_dir": str(folder), "tracking": more})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / tracking.FIGURES).read_text().splitlines()]


def test_every_finite_number_is_told_and_nothing_else() -> None:
    assert tracking.points(MANIFEST) == [
        Point("rows/steps", 0, 2.0),
        Point("seconds", 0, 3.5),
        Point("peak_memory_mb", 0, 100.0),
        Point("loss", 0, 1.5),
        Point("loss", 2, 1.0),
        Point("gate/audit", 0, 0.25),
    ]


def test_a_run_leaves_its_figures_as_lines(tmp_path: Path) -> None:
    chosen = config.load("smoke", ["world.sessions=300", f"run_dir={tmp_path}"])
    for _ in range(2):  # resumed: the same lines again, not more
        controller.run(chosen, until="sessions")
        found = lines(tmp_path)
        assert {line["stage"] for line in found} == {"log", "sessions"}
        counted = {line["name"]: line["value"] for line in found if line["stage"] == "log"}
        assert counted["rows/sessions"] == 300.0 and counted["seconds"] > 0
        assert len({(line["stage"], line["name"], line["step"]) for line in found}) == len(found)


def test_tensorboard_shows_each_stage_once(tmp_path: Path) -> None:
    for loss in ([3.0, 2.0], [3.0, 2.0], [9.0, 8.0, 7.0]):
        told = MANIFEST.model_copy(update={"key": f"of {loss[0]}", "figures": {"loss": loss}})
        Tracker(settings(tmp_path, to=["tensorboard"])).stage(told)
        shown = EventAccumulator(str(tmp_path / "tensorboard/align_1_sft"))
        shown.Reload()
        assert [(event.step, event.value) for event in shown.Scalars("loss")] == list(enumerate(loss))


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_is_one_sentence(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(module: str, *rest: Any) -> Any:
        if module.startswith(package):
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ConfigError, match=rf"^tracking.to: {name} is not installed; `pip install 'rgalign_ray\[{name}\]'`"
    ):
        Tracker(settings(tmp_path, to=[name]))


def test_a_server_that_is_away_is_known_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        InfrastructureError, match=r"^tracking.mlflow_uri: http://127.0.0.1:9 does not answer \("
    ) as met:
        Tracker(settings(tmp_path, to=["mlflow"], mlflow_uri="http://127.0.0.1:9"))
    assert "\n" not in str(met.value)


def test_a_tracker_that_fails_on_the_way_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("gone\nfar away")

    tracker = Tracker(settings(tmp_path, to=["tensorboard"]))
    monkeypatch.setattr(tracking.Tensorboard, "stage", fails)
    for key in ("k1", "k2"):
        tracker.stage(MANIFEST.model_copy(update={"key": key}))
    tracker.end()
    assert capsys.readouterr().err.count("tensorboard is told no more (gone);") == 1
    assert {line["key"] for line in lines(tmp_path)} == {"k2"}


def test_mlflow_is_told_of_a_stage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with `early_stop` goes through its first stages twice, in one process."""
    batches, tags = [], []
    client = SimpleNamespace(
        log_batch=lambda run, metrics: batches.append(metrics), set_tag=lambda run, tag, key: tags.append(key)
    )
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *values: values))
    known = tracking.Mlflow.__new__(tracking.Mlflow)
    known.client, known.told, known.run = client, {}, SimpleNamespace(info=SimpleNamespace(run_id="r"))
    for key in ("k1", "k1", "k2"):
        known.stage(MANIFEST.model_copy(update={"key": key}), tracking.points(MANIFEST))
    assert len(batches) == 2 and tags == ["k1", "k2"]
