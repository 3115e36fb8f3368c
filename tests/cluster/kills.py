"""Death, at a given moment."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def alive(worker: str) -> list[psutil.Process]:
    """Workers of some class, of the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # others come and go meanwhile
            if any(f"ray::{worker}" in part for part in process.cmdline()):
                found.append(process)
    return found


def kill(worker: str) -> int:
    """Kills the last of those workers; returns its process id."""
    last = alive(worker)[-1]
    last.kill()
    return last.pid


def when(there: Callable[[], bool], act: Callable[[], object], within_s: float = 300.0) -> threading.Thread:
    """Acts, in a thread, as soon as something is so."""

    def wait() -> None:
        until = time.monotonic() + within_s
        while not there():
            assert time.monotonic() < until, "it never came"
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kept_twice(records: Path) -> Callable[[], bool]:
    """Whether a run of Ray Train has begun its second checkpoint, so that the first is whole."""
    seen: set[Path] = set()

    def there() -> bool:
        seen.update(records.glob("checkpoint_*"))
        return len(seen) > 1

    return there
