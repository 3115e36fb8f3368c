"""A run ends with the first round after which the auditor sees no gain."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_reward_auditor import ENCODER, spec
from test_reward_model import SESSIONS, place, sessions_table

from rgalign_ray import config, storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.loop import audit_stages, controller
from rgalign_ray.loop.stage import Run, Stage
from rgalign_ray.loop.stages import stages
from rgalign_ray.reward.auditor import Auditor, AuditorSpec

__all__ = ["place", "spec"]  # fixtures
ROLES = {"rank": 0.5, "align": 0.15, "audit": 0.1, "valid": 0.1, "test": 0.15}


def settings(run_dir: Path, **changes: object) -> config.Config:
    made = config.validate({"run_dir": str(run_dir), "rounds": 3, "early_stop": True, "roles": ROLES, **changes})
    return made.model_copy(update={"roles": made.roles.model_copy(update={"slices": made.rounds})})


def audited(run: Run, round_: int, rewards: dict[str, float]) -> None:
    """What the stage of a round leaves behind."""
    ids = list(rewards)
    table = pa.table({"session_id": ids, "user_id": [f"u-{i}" for i in ids], "reward": list(rewards.values())})
    storage.write_table(run.uri(audit_stages.queries_of(round_), audit_stages.AUDITED), table)


def test_the_gain_is_that_of_the_same_sessions(tmp_path: Path) -> None:
    run = Run(settings(tmp_path))
    draw = np.random.default_rng(0)
    before = {f"s{i}": float(draw.normal()) for i in range(60)}
    audited(run, 0, before)
    audited(run, 1, {i: before[i] + 0.1 for i in list(before)[::-1][:50]} | {"s99": 100.0})
    found = audit_stages.gain(run, 1)
    assert found.mean == pytest.approx(0.1) and found.users == (pytest.approx(0.1), pytest.approx(0.1))
    audited(run, 2, {"s99": 1.0, "s98": 1.0})
    audited(run, 1, {"s1": 1.0})
    with pytest.raises(DataError, match=r"audited_2: .* set early_stop to false"):
        audit_stages.gain(run, 2)


@pytest.mark.parametrize(("gains", "rounds"), [([0.1, 0.2], 3), ([0.1, 0.0], 2), ([-0.1], 1)])
def test_a_round_without_gain_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: list[float], rounds: int
) -> None:
    reached: list[int] = []

    def make(job: Run, sequence: list[Stage], until: int | None = None, tracker: None = None) -> None:
        assert until is not None
        round_ = int(sequence[until - 1].name.removeprefix("audited_"))
        assert not any(stage.name == f"rankers_{round_}" for stage in sequence[:until]), "known before it is needed"
        reached.append(round_)
        level = sum(gains[:round_])
        audited(job, 0, {"s0": 0.0, "s1": 1.0})
        audited(job, round_, {"s0": level, "s1": 1.0 + level})

    monkeypatch.setattr(controller, "run_stages", make)
    job = controller.settle_rounds(Run(settings(tmp_path)))
    assert job.config.rounds == rounds and reached == list(range(1, len(gains) + 1))
    names = [stage.name for stage in stages(job.config)]
    assert names[-1] == "evaluation" and f"rankers_{rounds}" in names and f"rankers_{rounds + 1}" not in names
    same = [stage for stage in stages(settings(tmp_path)) if stage.name in names and stage.name != "evaluation"]
    keyed = [(stage.name, stage.settings, stage.inputs, stage.does) for stage in same]
    assert keyed == [(s.name, s.settings, s.inputs, s.does) for s in stages(job.config)[:-1]], "nothing is made anew"


def test_a_run_without_it_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "run_stages", lambda *_: pytest.fail("nothing to know"))
    plain = settings(tmp_path, early_stop=False)
    assert controller.settle_rounds(Run(plain)).config.rounds == 3
    assert not any(stage.name.startswith("audited") for stage in stages(plain))


def test_clicked_validation_sessions_with_a_query_are_audited(place: Path, spec: AuditorSpec, tmp_path: Path) -> None:
    table = sessions_table()
    roles = ["valid" if session != "s0" else "rank" for session in SESSIONS]
    table = table.append_column("role", pa.array(roles)).append_column(
        "user_id", pa.array([f"u-{s}" for s in SESSIONS])
    )
    storage.write_table(str(tmp_path / "log/sessions/part.parquet"), table)
    shutil.copy(place / "log/intents.parquet", tmp_path / "log/intents.parquet")
    written = pa.table({"id": ["s0", "s1", "s1", "s3", "s4"], "readout": ["query", "query", "prompt", "query", "query"],
                        "query": ["a", "refund", None, "parcel", "card"]})  # fmt: skip
    storage.write_table(str(tmp_path / "embeddings_1/part.parquet"), written)
    (tmp_path / "template.yaml").write_text(spec.template.model_dump_json())
    prompt = {"template": str(tmp_path / "template.yaml")}
    made = settings(tmp_path, prompt=prompt, compare={"max_text_tokens": spec.max_text_tokens})
    assert made.compare.encoder == ENCODER
    run = Run(made, {"sessions": str(tmp_path / "log"), "auditor": str(place)})
    outcome = audit_stages.audit(run, str(tmp_path / "audited_1"), 1)
    found = storage.read_table(run.uri("audited_1", audit_stages.AUDITED)).to_pylist()
    assert [(row["session_id"], row["user_id"]) for row in found] == [("s1", "u-s1"), ("s3", "u-s3")]
    assert outcome.rows == {"sessions": 3, "judged": 2}, "s0 is of another role, s2 has no query, s4 no click"
    catalogue = Catalogue.load(str(tmp_path / "log"))
    for row, query in zip(found, ("refund", "parcel"), strict=True):
        alone = Auditor(spec).rewards(sessions_table([row["session_id"]]), [query], catalogue, made.reward)
        assert row["reward"] == pytest.approx(alone[0, 0], abs=1e-5)
    storage.write_table(str(tmp_path / "embeddings_2/part.parquet"), written.slice(0, 1))
    with pytest.raises(DataError, match="audited_2: no clicked validation session"):
        audit_stages.audit(run, str(tmp_path / "audited_2"), 2)


@pytest.mark.parametrize(("prompt", "hears"), [(0.85, True), (0.79, False)])
def test_whether_the_auditor_hears_is_said(prompt: float, hears: bool) -> None:
    figures = [{"gauc_by_readout": {"prompt": prompt + off, "null": 0.8 + off}} for off in (0.0, 0.1)]
    said = audit_stages.hearing_sentence([storage.Manifest(stage="auditor", key="", figures=each) for each in figures])
    assert f"reads {prompt - 0.8:+.4f} GAUC" in said
    assert ("it hears nothing" not in said) == hears
