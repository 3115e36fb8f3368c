"""Workers are where their labels say, and a node that dies takes nothing with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign_ray import storage

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def run(folder: Path, fate: str) -> tuple[dict[str, bytes], int]:
    """Files of the pool, and how many workers died."""
    job = Path(__file__).with_name("node_job.py")
    ended = subprocess.run(
        [sys.executable, str(job), str(folder), fate], capture_output=True, text=True, check=False, timeout=400
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads((folder / "told.json").read_text())
    at_work = {note.name for note in (folder / "notes").iterdir()}
    assert len(at_work) == 2 and at_work <= set(told["bound"])
    root = str(folder / "out")
    return {uri.removeprefix(root): Path(uri).read_bytes() for uri in storage.list_files(root)}, told["deaths"]


@pytest.mark.fault
def test_a_node_that_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    quiet, deaths = run(tmp_path / "quiet", "lives")
    assert deaths == 0 and len(quiet) >= 16
    killed, deaths = run(tmp_path / "killed", "dies")
    assert deaths > 0
    assert killed == quiet
