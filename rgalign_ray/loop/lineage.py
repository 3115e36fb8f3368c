"""Where every artefact of a run comes from: its reasoners and rankers by version, and what each was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop.stage import KEY_LETTERS, Run
from rgalign_ray.loop.stages import stages

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 140
"""Columns of the table on a narrower terminal: a version that is wrapped cannot be copied."""


def table(run_dir: str) -> Table:
    """A line a stage that is done: key, inputs with the keys they had, and the versions it holds.

    An input that has been made anew since is marked: what stands on it is no longer what the same command
    would make.

    Raises:
        ConfigError: where there is no run.
    """
    from rich.markup import escape
    from rich.table import Table

    place = storage.join(run_dir, "config.json")
    if not storage.exists(place):
        raise ConfigError(f"{run_dir}: no config.json here, so this is no run of rgalign loop.")
    run = Run(config.validate(storage.read_json(place) | {"run_dir": run_dir}))
    shown = Table(title=escape(f"lineage of {run_dir}"), title_justify="left")
    for column in ("stage", "key", "made of", "holds"):
        shown.add_column(column)
    made = {stage.name: storage.read_manifest(run.uri(stage.name)) for stage in stages(run.config)}
    for name, manifest in made.items():
        if manifest is None:
            shown.add_row(name, "[dim]not done[/]")
            continue
        inputs = []
        for other, key in manifest.inputs.items():
            now = made.get(other)
            stale = "" if now is not None and now.key == key else " [yellow]made anew since[/]"
            inputs.append(f"{other} {key[:KEY_LETTERS]}{stale}")
        shown.add_row(name, manifest.key[:KEY_LETTERS], "\n".join(inputs), "\n".join(_versions(run, name)))
    return shown


def _versions(run: Run, stage: str) -> list[str]:
    """Versions of the reasoner or the rankers in a stage's artefact."""
    from rgalign_ray.ranker import scoring
    from rgalign_ray.reasoner import models

    uri = run.uri(stage)
    if stage.startswith("align_"):
        return [f"reasoner {models.version_of(run.config.reasoner, uri)}"]
    if not stage.startswith("rankers_"):
        return []
    lines = []
    for place in storage.list_files(uri, scoring.META):
        name = storage.pure_path(place).parent.name
        meta = scoring.load_meta(storage.join(uri, name))
        lines.append(f"{name} {meta.version[:KEY_LETTERS]}, reads {meta.reasoner_version or 'no reasoner'}")
    return lines
