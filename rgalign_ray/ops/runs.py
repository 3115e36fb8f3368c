"""Run directories side by side, and which of them to let go."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from rgalign_ray import storage
from rgalign_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

MARKS = ("config.json", "settled.json")
"""A folder with neither is no run, and is neither shown nor removed: settings of a run, and what a run, a comparison, a
sweep or a tuning has settled as it began."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run directory."""

    uri: str
    name: str
    """Of the folder."""
    artefacts: int
    """That are whole."""
    last: str
    """Stage that was finished last; empty where none was."""
    size: int
    """Bytes."""
    changed: datetime.datetime
    """When any of its files was written last, UTC."""


def list_runs(folder: str) -> list[RunFolder]:
    """The runs in a folder or under a URI, the latest last; empty where it is absent.

    Raises:
        ConfigError: when it is a file.
    """
    fs, root = storage.filesystem(folder)
    if fs.get_file_info(root).is_file:
        raise ConfigError(f"{folder}: a file; expected a folder that holds run directories.")
    files: dict[str, list[pafs.FileInfo]] = defaultdict(list)
    for info in fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True)):
        if info.type == pafs.FileType.File:
            name, _, _ = info.path[len(root) :].lstrip("/").partition("/")
            files[name].append(info)
    runs = []
    for name, infos in files.items():
        place = f"{root.rstrip('/')}/{name}"
        if not any(info.path == f"{place}/{mark}" for info in infos for mark in MARKS):
            continue
        manifests = {
            info.path.removeprefix(f"{place}/").removesuffix(f"/{storage.MANIFEST}"): info.mtime
            for info in infos
            if info.path.endswith(f"/{storage.MANIFEST}")
        }
        stages = {stage: when for stage, when in manifests.items() if not stage.startswith(".")}
        runs.append(
            RunFolder(
                uri=storage.join(folder, name),
                name=name,
                artefacts=len(stages),
                last=max(stages, key=lambda stage: stages[stage]) if stages else "",
                size=sum(info.size for info in infos),
                changed=max(info.mtime for info in infos),
            )
        )
    return sorted(runs, key=lambda run: (run.changed, run.name))


def stale(runs: Sequence[RunFolder], keep: int, older_than_days: float, now: datetime.datetime) -> list[RunFolder]:
    """Those to let go: not among the `keep` latest, and unchanged for so many days.

    Args:
        runs: as `found` returns them.
        keep: at least 0.
        older_than_days: at least 0.
        now: UTC.
    """
    limit = now - datetime.timedelta(days=older_than_days)
    return [run for run in runs[: len(runs) - keep if keep else None] if run.changed <= limit]


def remove(run: RunFolder) -> None:
    """Deletes a run, its manifests first and its marks last: what a death on the way leaves is taken for whole by
    nobody, is still found, and is removed by the next try.
    """
    for manifest in storage.list_files(run.uri, f"/{storage.MANIFEST}"):
        storage.delete(manifest)
    for entry in storage.entries(run.uri):
        if entry not in MARKS:
            storage.delete(storage.join(run.uri, entry))
    storage.delete(run.uri)


def table(runs: Sequence[RunFolder], title: str) -> Table:
    """Runs for the terminal."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in ("run", "artefacts", "last of them", "MB", "changed (UTC)"):
        shown.add_column(column, justify="right" if column in ("artefacts", "MB") else "left")
    for run in runs:
        shown.add_row(run.name, f"{run.artefacts}", run.last, f"{run.size / 1e6:,.1f}", f"{run.changed:%Y-%m-%d %H:%M}")
    return shown
