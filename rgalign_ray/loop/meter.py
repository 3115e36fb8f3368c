"""How much memory a run holds: its own processes and the Ray processes it started."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

SAMPLE_EVERY_S = 5.0
"""Adding up the pages of a dozen processes takes a tenth of a second of a core."""


class PeakMemory:
    """Samples the memory of this process and its descendants while the block runs.

    Proportional set sizes are added up, so that pages shared between processes count once. A cluster's
    other nodes are not seen.
    """

    def __enter__(self) -> PeakMemory:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, memory_mb())
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def memory_mb() -> float:
    """MiB held by this process and its descendants now."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total / 2**20
