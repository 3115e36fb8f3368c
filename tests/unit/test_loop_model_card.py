"""An aligned reasoner says what it is, what it was made of, and what it is not for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rgalign_ray import config, storage
from rgalign_ray.loop import model_card
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner.models import DESCRIPTION

FIGURES = {"sessions": 1234, "steps": 3, "loss": [2.0, 1.5, 1.25], "accuracy": 0.5, "notes": ["not a number"]}


def card(folder: Path, weights: str | None = None, **changes: Any) -> str:
    settings = config.validate({"run_dir": str(folder), "reasoner": {"model": "tiny"}} | changes)
    run = replace(Run(settings), stage_key="0123456789abcdef")
    meta = scoring.Meta(
        kind="qe_rec", settings=config.Ranker(), sizes={}, space={}, space_version="s", intent_ids=[],
        reasoner_version="tiny", seed=0, version="ranker-version",
    )  # fmt: skip
    storage.write_json(run.uri("rankers_0", "qe_rec", scoring.META), meta.model_dump(mode="json"))
    for name in ("selected_1", "rankers_0", "align_1_sft"):
        storage.write_json(
            run.uri(name, storage.MANIFEST), storage.Manifest(stage=name, key=f"key-{name}").model_dump()
        )
        storage.write_json(run.uri(name, DESCRIPTION), {"version": "tiny+1.sft"})
    out = run.uri("made")
    storage.write_json(storage.join(out, DESCRIPTION), {"version": "tiny+1.contrastive"})
    model_card.write(run, out, "align_1_contrastive", 1, "contrastive", weights, FIGURES)
    return (folder / "made" / model_card.FILE).read_text()


def test_what_it_was_made_of_and_what_it_is_not_for(tmp_path: Path) -> None:
    text = card(tmp_path, weights="align_1_sft")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "tiny" and yaml.safe_load(head)["library_name"] == "peft"
    cells = [line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ")]
    rows = {each[0]: each[1].strip() for each in cells if len(each) == 2}
    assert body.startswith("\n# tiny+1.contrastive\n")
    assert rows["log"] == "the simulated shop"
    assert rows["sessions learned from"].startswith("1,234, clicked")
    assert rows["starts from"] == "tiny+1.sft"
    assert rows["judged by"] == "ranker ranker-version, which reads reasoner tiny"
    assert "lr: 0.0002" in rows["objective"]
    for made in ("0123456789abcdef", "of selected_1 key-selected_1", "of rankers_0 key-rankers_0", "key-align_1_sft"):
        assert made in rows["artefact"]
    assert rows["loss"] == "2 | 1.25" and rows["accuracy"] == "| 0.5" and "notes" not in rows
    assert "Its users were simulated" in body
    assert str(tmp_path) not in text


def test_all_weights_of_a_real_log(tmp_path: Path) -> None:
    log = {"source": "parquet", "uri": "s3://b/log", "intents": "s3://b/i.parquet"}
    text = card(tmp_path, log=log, reasoner={"model": "tiny", "lora": None})
    assert "library_name: transformers" in text and "All weights of `tiny`" in text
    assert "simulated" not in text and "| starts from | tiny |" in text
    assert card(tmp_path, log=log, reasoner={"model": "tiny", "lora": None}) == text
