"""What a run's artefacts were made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import lineage
from rgalign_ray.reasoner.models import DESCRIPTION


def manifest(run: Path, stage: str, key: str, **inputs: str) -> None:
    made = storage.Manifest(stage=stage, key=key, inputs=inputs, rows={}, figures={}, seconds=1.0, peak_memory_mb=1)
    storage.write_json(str(run / stage / storage.MANIFEST), made.model_dump())


def lines(run: Path) -> list[list[str]]:
    """The table's lines as cells."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(lineage.table(str(run)))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]


def test_each_stage_names_what_it_was_made_of_and_what_it_holds(tmp_path: Path) -> None:
    settings = config.load("smoke", [f"run_dir={tmp_path}/elsewhere"])
    storage.write_json(str(tmp_path / "config.json"), settings.model_dump(mode="json"))
    manifest(tmp_path, "log", "aaaaaaaaaa")
    manifest(tmp_path, "sessions", "bbbbbbbbbb", log="aaaaaaaaaa")
    manifest(tmp_path, "features", "cccccccccc", sessions="old-session-key")
    manifest(tmp_path, "align_1_sft", "dddddddddd")
    storage.write_json(str(tmp_path / "align_1_sft" / DESCRIPTION), {"version": "tiny+1.sft"})
    found = {line[0]: line[1:] for line in lines(tmp_path)}
    assert found["log"] == ["aaaaaaaa", "", ""]
    assert found["sessions"] == ["bbbbbbbb", "log aaaaaaaa", ""]
    assert found["features"] == ["cccccccc", "sessions old-sess made anew since", ""]
    assert found["align_1_sft"] == ["dddddddd", "", "reasoner tiny+1.sft"]
    assert found["evaluation"] == ["not done", "", ""]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json here"):
        lineage.table(str(tmp_path))
