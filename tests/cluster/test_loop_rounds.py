"""Two rounds of the closed loop with a teacher and an auditor, each with an objective of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign_ray import config, storage
from rgalign_ray.loop.stages import stages
from rgalign_ray.reasoner import models

OBJECTIVES = ["sft", "grpo", "gradient"]
OVERRIDES = [
    "world.sessions=900",
    "rounds=2",
    "retrain.start=previous",
    "roles.rank=0.25",
    "roles.align=0.25",
    "roles.audit=0.15",
    "roles.valid=0.1",
    "roles.test=0.25",
    "ranker.epochs=2",
    "ranker.workers=0",
    "learner.workers=0",
    f"align=[{', '.join(OBJECTIVES)}]",
    *(f"{objective}.batch_sessions=8" for objective in OBJECTIVES),
    "grpo.n=2",
    "teachers=[{name: hotter, n: 1, temperature: 1.3}]",
]


@pytest.mark.slow
@pytest.mark.cluster
def test_two_rounds_of_three_objectives(tmp_path: Path) -> None:
    sets = [part for override in [*OVERRIDES, f"run_dir={tmp_path}"] for part in ("--set", override)]
    command = [sys.executable, "-m", "rgalign_ray.cli", "loop", "--config", "smoke", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = config.load("smoke", [*OVERRIDES, f"run_dir={tmp_path}"])
    for stage in stages(settings):
        assert storage.read_manifest(str(tmp_path / stage.name)), stage.name
    for round_ in (1, 2):
        for objective in OBJECTIVES:
            manifest = storage.read_manifest(str(tmp_path / f"align_{round_}_{objective}"))
            assert manifest is not None and len(manifest.figures["loss"]) == manifest.rows["steps"] > 0
        rollouts = storage.read_manifest(str(tmp_path / f"rollouts_{round_}"))
        assert rollouts is not None and set(rollouts.figures["valid_rate_by_source"]) == {"policy", "hotter"}
        rewards = storage.read_manifest(str(tmp_path / f"rewards_{round_}"))
        assert rewards is not None and -1 <= rewards.figures["gate"]["audit"] <= 1
    evaluation = storage.read_json(str(tmp_path / "evaluation/evaluation.json"))
    for found in evaluation["diagnoses"]:
        assert found["moved"] > 0 and 0 <= found["common"] <= 1 and found["queries"] > 0
    assert [found["name"] for found in evaluation["diagnoses"]] == ["Round 1", "Round 2"]
    said = (tmp_path / "report.html").read_text()
    assert "2 policy + 1 hotter, all of one LLM" in said
    rows = [row["name"] for row in evaluation["rows"]]
    assert rows[:4] == ["two-tower", "QE-Rec", "RGAlign-Rec, round 1", "RGAlign-Rec"]
    assert rows[-1] == "QE-Rec trained on"
    aligned = {round_: str(tmp_path / f"align_{round_}_{settings.align[-1]}") for round_ in (1, 2)}
    versions = {round_: models.version_of(settings.reasoner, folder) for round_, folder in aligned.items()}
    for round_, version in versions.items():
        assert version.startswith(f"tiny+{round_}.{settings.align[-1]}@"), "a name is of one stage of one run"
        ranker = storage.read_json(str(tmp_path / f"rankers_{round_}/qe_rec/ranker.json"))
        assert ranker["reasoner_version"] == version, "each ranker reads the reasoner of its round"
    for name in ("qe_rec", "shuffled"):
        figures = [storage.read_json(str(tmp_path / f"rankers_{r}/{name}/ranker.json"))["figures"] for r in range(3)]
        assert figures[0]["losses"][0] > max(it["losses"][0] for it in figures[1:]), "each goes on from the one before"
    places = (f"{folder}/qe_rec/ranker.json" for folder in ("rankers_0", "trained_on_1", "trained_on_2"))
    first, *on = (storage.read_json(str(tmp_path / place)) for place in places)
    assert first["figures"]["losses"][0] > max(it["figures"]["losses"][0] for it in on), "so does the control"
    assert {it["reasoner_version"] for it in on} == {first["reasoner_version"]}, "on the frozen reasoner"
    shown = subprocess.run(
        [sys.executable, "-m", "rgalign_ray.cli", "lineage", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and f"reasoner {versions[2]}" in shown.stdout
