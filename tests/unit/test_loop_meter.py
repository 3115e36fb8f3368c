"""The memory of a run: its own, its processes', and the most it held."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from rgalign_ray.loop import meter

MIB = 2**20


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "SAMPLE_EVERY_S", 0.01)


def test_the_peak_outlives_what_was_freed() -> None:
    before = meter.memory_mb()
    with meter.PeakMemory() as memory:
        held = np.ones(128 * MIB, np.uint8)
        # One sample of a large process on a busy machine can take longer than any fixed pause.
        deadline = time.monotonic() + 60
        while memory.peak_mb < before + 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        del held
    assert before + 100 < memory.peak_mb < before + 300
    assert meter.memory_mb() < memory.peak_mb - 100


def test_child_processes_count() -> None:
    code = "held = bytes(1) * (96 << 20); print(1, flush=True); input()"
    before = meter.memory_mb()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert meter.memory_mb() > before + 80
        child.communicate(b"\n")
    assert meter.memory_mb() < before + 50


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
