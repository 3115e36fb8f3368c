"""What a long stage says of itself, on a terminal and in a log."""

from __future__ import annotations

import sys
import threading

import pytest

from rgalign_ray import progress


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("encode", 4000, "sessions") as advance:
        for _ in range(4):
            clock.now += 10
            advance(1000)
    out, lines = capsys.readouterr()
    assert out == "", "progress does not belong to a command's output"
    assert lines.splitlines() == [
        "  encode: 2,000/4,000 sessions, about 20 s left",
        "  encode: 4,000 sessions in 40 s",
    ]


def test_remaining_time_waits_until_it_can_be_told(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("encode", 4000, "sessions") as advance:
        for n in (100, 900, 3000):
            clock.now += 20
            advance(n)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "  encode: 100/4,000 sessions",
        "  encode: 1,000/4,000 sessions, about 2 min 00 s left",
    ]


def test_steps_of_an_earlier_run_say_nothing_about_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.track("ladder", 50, "slices", before=20) as advance:
        for n in (2, 4):
            clock.now += 60
            advance(n)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "  ladder: 22/50 slices",
        "  ladder: 26/50 slices, about 8 min 00 s left",
    ]


def test_a_stage_of_seconds_writes_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("rewards", 3, "units") as advance:
        for _ in range(3):
            clock.now += 1
            advance(1)
    assert capsys.readouterr().err == "  rewards: 3 units in 3 s\n"


def test_a_stage_without_steps_ends_too(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("rewards", 0):
        clock.now += 100
    assert capsys.readouterr().err.startswith("  rewards: 0 ")


def test_a_stage_that_fails_does_not_claim_to_be_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.track("encode", 2) as advance:
        advance(1 // 0)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.track("encode", 3, "sessions") as advance:
        advance(1)
        advance(2)
    shown = capsys.readouterr().err
    assert "encode" in shown and "3/3" in shown and "sessions" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (42.4, "42 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7200, "120 min 00 s")]
)
def test_clock(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_a_note_goes_beside_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress.note("no tests ran")
    assert capsys.readouterr().err == "  no tests ran\n"


def test_a_silent_minute_is_told_with_what_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 0.05)
    monkeypatch.setattr(progress, "clock", lambda seconds: f"{seconds:.2f}")
    asked = threading.Semaphore(0)

    def idle() -> str:
        asked.release()
        return "0 of 2 CPUs are free"

    with progress.track("encode", 10, "sessions", idle=idle) as advance:
        for _ in range(3):
            assert asked.acquire(timeout=10)
        advance(10)
        for _ in range(3):
            assert asked.acquire(timeout=10)
    told = [line for line in capsys.readouterr().err.splitlines() if "CPUs" in line]
    assert told[0] == "  encode: no sessions for 0.05; 0 of 2 CPUs are free"
    assert told[2] == "  encode: no sessions for 0.15; 0 of 2 CPUs are free"
    assert told[3:].count(told[0]) == 1, "a step begins a new silence"
