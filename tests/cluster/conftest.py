"""What tests share since it takes long: a Ray, the wheel, and a run of the whole loop that nothing disturbs."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from quiet_run import SETTINGS, QuietRun, call

from rgalign_ray.config import Cluster, Config
from rgalign_ray.loop.connection import connect

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started as the loop starts it: of its own, whatever other cluster is named."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        connect(Config(cluster=Cluster(num_cpus=2, object_store_mb=256)))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "rgalign_ray", source / "rgalign_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source, timeout=120)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environment_of_the_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel, and sees this one's packages but not its editable installs.

    A path named by a .pth file is searched, but .pth files inside it are not read: an editable
    install, which is one, stays behind.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    found = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, timeout=30)
    purelib = Path(found.stdout.strip())
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "packages_of_the_tests.pth").write_text("\n".join(sorted(paths)) + "\n")
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    call(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder, timeout=120)
    return folder


@pytest.fixture(scope="session")
def quiet_run(environment_of_the_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> QuietRun:
    """By the wheel alone, in an empty folder."""
    folder = tmp_path_factory.mktemp("quiet")
    rgalign = environment_of_the_wheel / "bin" / "rgalign"
    ended = call(rgalign, "loop", *SETTINGS, "--run-dir", "run", cwd=folder, timeout=900)
    return QuietRun(folder / "run", ended.stdout)
