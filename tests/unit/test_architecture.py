"""The walls of the house: who may import whom, checked on the package and on planted violations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "rgalign_ray", tmp_path / "rgalign_ray", ignore=shutil.ignore_patterns("__pycache__", "*.html")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_wall_stands() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("logs/planted.py", "from rgalign_ray import reasoner", "Floors"),
        ("config/planted.py", "from rgalign_ray import logs", "Floors"),
        ("world/planted.py", "import rgalign_ray.logs", "Floors"),
        ("rollout/planted.py", "from rgalign_ray.world import generate", "Truth"),
        ("reasoner/planted.py", "import ray", "Ray"),
        ("evaluate/planted.py", "from ray.data import Dataset", "Ray"),
        ("attic.py", "", "rgalign_ray.attic"),
    ],
)
def test_a_planted_violation_is_caught(copy: Path, module: str, line: str, contract: str) -> None:
    planted = copy / "rgalign_ray" / module
    planted.write_text((planted.read_text() if planted.exists() else "") + f"\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0
    assert contract in done.stdout.partition("Broken contracts")[2] + done.stderr, done.stdout + done.stderr


def test_truth_is_kept_from_every_room_that_learns(copy: Path) -> None:
    """The contract names its rooms one by one: a room added to the house must be added to it, or to this list."""
    import tomllib

    contracts = tomllib.loads((copy / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (world,) = (contract for contract in contracts if contract["id"] == "world")
    rooms = {path.parent.name for path in (copy / "rgalign_ray").glob("*/__init__.py")}
    may_know = {"world", "evaluate", "loop", "ops"}
    assert {name.removeprefix("rgalign_ray.") for name in world["source_modules"]} == rooms - may_know


def test_the_documents_name_every_reason_for_setting_a_row_aside() -> None:
    from rgalign_ray.logs.faults import REASONS

    table = (ROOT / "docs" / "your-own-log.md").read_text()
    assert {reason for reason in REASONS if f"`{reason}`" not in table} == set()
