"""Progress of long stages: a bar with the remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

Advance = Callable[[int], None]

LINE_EVERY_S = 15.0
"""Without a terminal (logs, CI) one line at most this often."""
TELLS_FROM = 0.1
"""Share of the work from which the remaining time is told."""
SILENT_S = 60.0
"""Without a step for as long, a line says so."""


@contextmanager
def track(
    label: str, total: int, unit: str = "", before: int = 0, idle: Callable[[], str] | None = None
) -> Iterator[Advance]:
    """Shows how far `total` steps of `label` have come; the block calls `advance(n)` after each n of them.

    Args:
        label: of the work.
        total: steps.
        unit: of them.
        before: those that an earlier run has done: they say nothing about the time that is left.
        idle: asked, in a thread of its own, what may be missing when there is no step for a minute; None: nobody is.
    """
    shown = (_bar if sys.stderr.isatty() else _lines)(label, total, unit, before)
    with shown as advance, _listening(label, unit, idle) if idle else nullcontext(_unheard) as heard:

        def step(n: int) -> None:
            heard()
            advance(n)

        yield step


def _unheard() -> None:
    pass


@contextmanager
def _listening(label: str, unit: str, idle: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Says when there was no step for a minute, and for another."""
    heard, over = threading.Event(), threading.Event()

    def listen() -> None:
        silent = 0
        while not over.wait(SILENT_S):
            silent = 0 if heard.is_set() else silent + 1
            heard.clear()
            if silent:
                note(f"{label}: no {unit} for {clock(silent * SILENT_S)}; {idle()}")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield heard.set
    finally:
        over.set()
        listener.join()


@contextmanager
def _lines(label: str, total: int, unit: str, before: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = before

    def advance(n: int) -> None:
        nonlocal done, last
        now = time.monotonic()
        done += n
        if now - last >= LINE_EVERY_S and done < total:
            # from the whole time so far, since units arrive in bursts and a rate taken between two of them
            # would be anything; at first that is mostly the start of the workers, and tells nothing
            here = done - before
            told = here and here >= (total - before) * TELLS_FROM
            about = f", about {clock((now - started) / here * (total - done))} left" if told else ""
            print(f"  {label}: {done:,}/{total:,} {unit}{about}", file=sys.stderr, flush=True)
            last = now

    yield advance
    print(f"  {label}: {done:,} {unit} in {clock(time.monotonic() - started)}", file=sys.stderr, flush=True)


@contextmanager
def _bar(label: str, total: int, unit: str, before: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=before)

        def advance(n: int) -> None:
            bar.advance(task, n)

        yield advance


def clock(seconds: float) -> str:
    """Seconds as 42 s or 3 min 05 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def note(text: str) -> None:
    """A line that must not be missed, beside the progress."""
    print(f"  {text}", file=sys.stderr, flush=True)
