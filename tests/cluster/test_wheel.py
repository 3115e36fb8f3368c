"""The wheel, installed alone into a new environment, runs the loop in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rgalign_ray"

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, timeout: float) -> str:
    """Runs a command without this process's Python paths; returns its output, fails with all of it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(PACKAGE, source / "rgalign_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source, timeout=120)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel, and sees this one's packages but not its editable installs.

    A path named by a .pth file is searched, but .pth files inside it are not read: an editable
    install, which is one, stays behind.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, timeout=30).strip()
    )
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "packages_of_the_tests.pth").write_text("\n".join(sorted(paths)) + "\n")
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    call(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder, timeout=120)
    return folder


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_package_comes_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    found = call(python, "-c", "import rgalign_ray; print(rgalign_ray.__file__)", cwd=tmp_path, timeout=30)
    assert Path(found.strip()).is_relative_to(environment)


def test_the_installed_command_runs_the_loop_in_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    rgalign = environment / "bin" / "rgalign"
    assert "loop" in call(rgalign, "--help", cwd=tmp_path, timeout=30)
    assert list(tmp_path.iterdir()) == []
    out = call(rgalign, "loop", "--config", "smoke", cwd=tmp_path, timeout=900)
    (report,) = tmp_path.rglob("report.html")
    assert report.name in out
    assert "QE-Rec" in report.read_text()
