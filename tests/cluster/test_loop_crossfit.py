"""The closed loop without users of role align, ended by the auditor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign_ray import config, storage
from rgalign_ray.loop import audit_stages
from rgalign_ray.loop.stage import Run

OVERRIDES = [
    "world.sessions=900", "rounds=2", "early_stop=true", "crossfit=2", "align=[sft]", "ranker.epochs=2",
    "ranker.workers=0", "learner.workers=0", "roles.rank=0.35", "roles.align=0", "roles.audit=0.15", "roles.valid=0.2",
    "roles.test=0.3",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.cluster
def test_folds_judge_each_other_and_the_auditor_ends_the_rounds(tmp_path: Path) -> None:
    sets = [part for override in [*OVERRIDES, f"run_dir={tmp_path}"] for part in ("--set", override)]
    command = [sys.executable, "-m", "rgalign_ray.cli", "loop", "--config", "smoke", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    folds = [f"judge_{seed}_fold_{fold}" for seed in range(2) for fold in range(2)]
    assert all((tmp_path / "rankers_0" / name / "ranker.json").exists() for name in folds)
    role = storage.read_table(str(tmp_path / "sessions/sessions"), ["session_id", "role"])
    of = dict(zip(role["session_id"].to_pylist(), role["role"].to_pylist(), strict=True))
    scored = storage.read_table(str(tmp_path / "rewards_1/scored"))
    assert {of[session] for session in scored["session_id"].to_pylist()} == {"rank"}
    assert len(set(scored["ranker_version"].to_pylist())) == 2, "each session by the ranker of its fold"
    run = Run(config.validate(storage.read_json(str(tmp_path / "config.json")) | {"run_dir": str(tmp_path)}))
    assert run.config.rounds == (2 if audit_stages.gain(run, 1).mean > 0 else 1)
    assert (tmp_path / "rankers_2").exists() == (run.config.rounds == 2)
    rows = [row["name"] for row in storage.read_json(str(tmp_path / "evaluation/evaluation.json"))["rows"]]
    assert len([name for name in rows if name.startswith("RGAlign-Rec")]) == run.config.rounds
    assert "as the auditor rewards them" in done.stdout
