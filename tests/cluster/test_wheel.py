"""The wheel, installed alone into a new environment, runs the loop in an empty folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from quiet_run import QuietRun, call

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "rgalign_ray").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {str(path.relative_to(ROOT)) for path in files}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_package_comes_from_the_wheel(environment_of_the_wheel: Path, tmp_path: Path) -> None:
    python = environment_of_the_wheel / "bin" / "python"
    found = call(python, "-c", "import rgalign_ray; print(rgalign_ray.__file__)", cwd=tmp_path, timeout=30)
    assert Path(found.stdout.strip()).is_relative_to(environment_of_the_wheel)


def test_the_installed_command_leaves_nothing_but_the_run(environment_of_the_wheel: Path, quiet_run: QuietRun) -> None:
    rgalign, folder = environment_of_the_wheel / "bin" / "rgalign", quiet_run.folder
    assert "loop" in call(rgalign, "--help", cwd=folder.parent, timeout=30).stdout
    assert list(folder.parent.iterdir()) == [folder]
    (report,) = folder.rglob("report.html")
    assert report.name in quiet_run.stdout
    assert "QE-Rec" in report.read_text()
