"""What an alignment hands to its learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rgalign_ray import config, storage
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.loop import align_stages
from rgalign_ray.loop.stage import Run


def test_no_two_alignments_give_their_reasoner_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are kept by version, and rankers are held to the one that they have learned from."""
    tasks: list[LearnerTask] = []

    def fit(task: LearnerTask, *_: Any) -> dict[str, int]:
        tasks.append(task)
        return {"sessions": 1, "steps": 1}

    monkeypatch.setattr(align_stages.training, "fit", fit)
    monkeypatch.setattr(align_stages.model_card, "write", lambda *_: None)
    chosen = config.validate({"run_dir": str(tmp_path), "reasoner": {"model": "tiny"}})
    storage.write_table(str(tmp_path / "selected_1" / align_stages.SELECTED), pa.table({"session_id": ["s"]}))
    for key in ("0123456789abcdef", "fedcba9876543210"):
        align_stages.align(Run(chosen, stage_key=key), str(tmp_path / "out"), "sft", 1, None)
    assert [task.version for task in tasks] == ["tiny+1.sft@01234567", "tiny+1.sft@fedcba98"]
