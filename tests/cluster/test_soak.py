"""Ten minutes of the closed loop under a killer that strikes at random: it always ends as a quiet run, to the bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from quiet_run import SETTINGS, QuietRun

pytestmark = [pytest.mark.soak]

SOAK_S = 600.0
PAUSE_S = (3.0, 15.0)
DRIVER_DIES = 0.1
"""Share of the strikes."""
SEED = 7
VICTIMS = tuple(
    f"ray::{name}" for name in ("RolloutWorker", "RewardModel", "RayTrainWorker", "MapWorker", "encode_items")
)
EVALUATION = "evaluation/evaluation.json"
COMMAND = [
    *(sys.executable, "-m", "rgalign_ray.cli", "loop", *SETTINGS),
    *("--set", "rollout.retries=1000", "--set", "rollout.quarantine=0"),
    *("--set", "ranker.retries=1000", "--set", "learner.retries=1000"),
]
INFRASTRUCTURE = 4
"""Exit status of a run that gave up: the same command goes on."""


class Killer:
    """Strikes the workers of a driver, and the driver, until it is told to stop."""

    def __init__(self, driver: int, draw: random.Random, until: float, struck: Counter[str]) -> None:
        self.driver, self.draw, self.until, self.struck = psutil.Process(driver), draw, until, struck
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _strike(self) -> None:
        while not self._over.wait(self.draw.uniform(*PAUSE_S)) and time.monotonic() < self.until:
            try:
                if self.draw.random() < DRIVER_DIES:
                    self.driver.kill()
                    self.struck["driver"] += 1
                    return
                workers = [(each, " ".join(each.cmdline())) for each in self.driver.children(recursive=True)]
                workers = [(each, name) for each, name in workers if name.startswith(VICTIMS)]
                if workers:
                    victim, name = self.draw.choice(workers)
                    victim.kill()
                    self.struck[name.split(".")[0].split("(")[0].strip()] += 1
            except psutil.NoSuchProcess:
                continue


def test_the_loop_ends_as_if_nobody_had_been_killed(quiet_run: QuietRun, tmp_path: Path) -> None:
    expected = (quiet_run.folder / EVALUATION).read_bytes()
    draw, struck = random.Random(SEED), Counter[str]()
    until = time.monotonic() + SOAK_S
    whole = tries = 0
    while time.monotonic() < until:
        folder = tmp_path / f"killed_{whole}"
        tries += 1
        driver = subprocess.Popen(
            [*COMMAND, "--run-dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        killer = Killer(driver.pid, draw, until, struck)
        _, told = driver.communicate()
        killer.stop()
        assert driver.returncode in (0, -signal.SIGKILL, INFRASTRUCTURE), told[-5000:]
        if driver.returncode == 0:
            whole += 1
            assert (folder / EVALUATION).read_bytes() == expected
        print(f"{tries} tries, {whole} whole; killed {dict(struck)}", flush=True)
    assert sum(struck.values()) > 10
    assert whole > 0
