"""What an alignment hands to its learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rgalign_ray import config, storage
from rgalign_ray.errors import DataError
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


def test_without_a_query_nothing_is_learned_from_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_stages.training, "fit", lambda *_: {"sessions": 1, "steps": 1})
    monkeypatch.setattr(align_stages.model_card, "write", lambda *_: None)
    rows = pa.table({"session_id": ["s"], "completion_ids": pa.array([None], pa.list_(pa.int32()))})
    storage.write_table(str(tmp_path / "selected_1" / align_stages.POSITIVES), rows)
    for readouts in (["prompt", "query"], ["query"]):
        asked = {"run_dir": str(tmp_path), "gradient": {"readouts": readouts}}
        run = Run(config.validate(asked))
        if readouts == ["query"]:
            with pytest.raises(DataError, match=r"^align_1_gradient: no session to learn from; lower select\.margin"):
                align_stages.align(run, str(tmp_path / "out"), "gradient", 1, None)
        else:
            assert align_stages.align(run, str(tmp_path / "out"), "gradient", 1, None).rows["sessions"] == 1


@pytest.mark.parametrize(
    ("round_", "objective", "before", "encoder"),
    [(1, "sft", None, None), (1, "gradient", "align_1_sft", None), (2, "gradient", "align_2_sft", "align_1_gradient")],
)
def test_an_objective_goes_on_from_the_one_before_and_asks_the_pair_of_the_round_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    round_: int,
    objective: str,
    before: str | None,
    encoder: str | None,
) -> None:
    tasks: list[LearnerTask] = []
    monkeypatch.setattr(
        align_stages.training, "fit", lambda task, *_: tasks.append(task) or {"sessions": 1, "steps": 1}
    )
    monkeypatch.setattr(align_stages.model_card, "write", lambda *_: None)
    run = Run(
        config.validate(
            {"run_dir": str(tmp_path), "rounds": 2, "align": ["sft", "gradient"], "reward": {"judge_seeds": 3}}
        )
    )
    for table in (align_stages.SELECTED, align_stages.POSITIVES):
        storage.write_table(run.uri(f"selected_{round_}", table, "0.parquet"), pa.table({"session_id": ["s"]}))
    align_stages.align(run, str(tmp_path / "out"), objective, round_, before)
    (task,) = tasks
    assert task.weights == (run.uri(before) if before else None)
    assert task.data == run.uri(f"selected_{round_}")
    assert task.pair is not None
    assert task.pair.rankers == tuple(run.uri(f"rankers_{round_ - 1}", name) for name in ("qe_rec", "judge_1"))
    assert task.pair.encoder == (run.uri(encoder) if encoder else None)
    assert task.pair.sessions == run.uri(f"rollouts_{round_}", "sessions")
