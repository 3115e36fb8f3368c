"""The memory of a run: its own, its processes', and the most it held."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from rgalign_ray.loop import meter

HELD = """
import time
import numpy as np
from rgalign_ray.loop import meter

meter.SAMPLE_EVERY_S = 0.01
before = meter.memory_mb()
with meter.PeakMemory() as memory:
    held = np.ones(128 << 20, np.uint8)
    # A sample on a busy machine can take longer than any fixed pause.
    deadline = time.monotonic() + 60
    while memory.peak_mb < before + 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    del held
print(before, memory.peak_mb, meter.memory_mb())
"""

CHILD = """
import subprocess, sys
from rgalign_ray.loop import meter

before = meter.memory_mb()
code = "held = bytes(1) * (96 << 20); print(1, flush=True); input()"
with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    during = meter.memory_mb()
    child.communicate(b"\\n")
print(before, during, meter.memory_mb())
"""


def _readings(code: str) -> tuple[float, float, float]:
    """MiB before, at most and after, by a process of its own.

    This one and its children, left by other tests, may give back as much meanwhile as is measured here.
    """
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    before, peak, after = map(float, printed.stdout.split())
    return before, peak, after


def test_the_peak_outlives_what_was_freed() -> None:
    before, peak, after = _readings(HELD)
    assert before + 100 < peak < before + 300
    assert after < peak - 100


def test_child_processes_count() -> None:
    before, during, after = _readings(CHILD)
    assert during > before + 80
    assert after < before + 50


def test_a_child_that_just_ended_is_passed_over() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # over, but not yet reaped
    assert meter.memory_mb() > 0
    child.wait()


def test_a_block_shorter_than_a_sample_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "SAMPLE_EVERY_S", 3600.0)
    started = time.monotonic()
    with meter.PeakMemory() as memory:
        pass
    assert memory.peak_mb > 10
    assert time.monotonic() - started < 60, "leaving the block does not wait for the next sample"


def test_an_error_of_the_block_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), meter.PeakMemory() as memory:
        _ = 1 // 0
    assert not memory._thread.is_alive()
