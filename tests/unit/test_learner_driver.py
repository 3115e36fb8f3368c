"""Without workers the calling process learns, and what it learns is what one worker does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from learner_data import LEARNER, OBJECTIVES, SESSIONS, task, write_round

from rgalign_ray.learner import gradient, training
from rgalign_ray.learner.engine import Host


def test_the_driver_learns_what_one_worker_learns(tmp_path: Path) -> None:
    training.group_of_one()
    write_round(tmp_path)
    settings = OBJECTIVES["gradient"]
    one = replace(task(tmp_path, tmp_path / "one", settings), objective="gradient")
    none = replace(one, learner=LEARNER.model_copy(update={"workers": 0}), out=str(tmp_path / "none"))
    steps = SESSIONS // settings.batch_sessions * settings.epochs
    figures = training.fit(none, steps, str(tmp_path / "train"), "gradient_1")
    assert figures["steps"] == steps and max(map(abs, figures["loss"])) > 1e-4, "there is something to learn"
    assert figures == gradient.train(one, Host())
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "none")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "train").exists(), "no state is kept"
