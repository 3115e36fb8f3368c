"""What the log's stages check of a run before they read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from logs_data import INTENTS, session, table

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import log_stages
from rgalign_ray.loop.stage import Run


def template(place: Path, text: str) -> str:
    parts = {"version": "1", "prefix": "", "session": text, "suffix": "", "item": "{{ title }}"}
    place.write_text(yaml.safe_dump(parts))
    return str(place)


def test_templates_of_the_prompt_and_of_teachers_are_held_to_the_ingested_columns(tmp_path: Path) -> None:
    prompt = template(tmp_path / "prompt.yaml", "{{ status }} in {{ region }}")
    teachers = template(tmp_path / "teacher.yaml", "{{ days_early }}")
    settings = config.load(
        "smoke",
        [
            f"run_dir={tmp_path}",
            f"prompt.template={prompt}",
            f"teachers=[{{name: a}}, {{name: b, template: {teachers}}}]",
        ],
    )
    run = Run(settings)
    rows = table(session(0)).drop_columns(["region"]).append_column("role", pa.array(["rank"]))
    storage.write_table(storage.join(run.uri("sessions"), "sessions/dt=2026-01-10/region=SG/part-00000.parquet"), rows)
    with pytest.raises(ConfigError, match=r"^teachers\.b\.template: the session text reads 'days_early'.*days_late"):
        log_stages.check_templates(run)
    log_stages.check_templates(Run(settings.model_copy(update={"teachers": []})))


def test_a_log_that_has_grown_since_it_was_read_is_told(tmp_path: Path) -> None:
    log, intents = tmp_path / "log", str(tmp_path / "intents.parquet")
    storage.write_table(intents, INTENTS)
    storage.write_table(str(log / "dt=2026-01-10/a.parquet"), table(session(0)))
    run = Run(
        config.validate(
            {
                "run_dir": str(tmp_path / "run"),
                "log": {"source": "parquet", "uri": str(log), "intents": intents, "end": "2026-01-11"},
            }
        )
    )
    figures = {"log": log_stages._stamp(run.config)}
    manifest = storage.Manifest(stage="sessions", key="k", figures=figures)
    storage.write_json(run.uri("sessions", storage.MANIFEST), manifest.model_dump())
    assert log_stages.log_changed(run) is None
    storage.write_table(str(log / "dt=2026-01-12/a.parquet"), table(session(1)))
    assert log_stages.log_changed(run) is None, "a day that the run does not read"
    storage.write_table(str(log / "dt=2026-01-10/b.parquet"), table(session(2)))
    assert "has changed since it was read; another run_dir reads it" in str(log_stages.log_changed(run))
    shutil.rmtree(log)
    assert "cannot be read any more; the run goes on" in str(log_stages.log_changed(run))
