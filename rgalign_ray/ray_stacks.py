"""What a process of Ray was at: its stacks, where it is silent for too long, and the last lines of its log.

Ray tells neither. A process writes its stacks into a file beside its log, and the driver has them read on that node.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STACKS = "stacks"
"""Ends the name of a folder of what processes were at that were silent for too long."""
AT = 0.9
"""Share of its deadline after which a process notes where it is."""
READ_S = 10.0
"""Wait for a file of another node."""
MOST_BYTES = 1 << 20
"""Of a file, from its end: a log may be long."""


class Place(NamedTuple):
    """Where an actor can be read about."""

    node: str = ""
    stacks: str = ""
    """File of its stacks; empty until a call is overdue."""
    log: str = ""
    """File that Ray keeps of what it says on standard error."""


@contextmanager
def noted(deadline_s: float, file: TextIO | None = None, *, ends: bool = False) -> Iterator[None]:
    """Has all stacks of this process noted, in `file` or on standard error, where the block is about to be overdue.

    A thread of C does, so that it also tells of a process that holds Python's lock for ever. With `ends` it ends the
    process as well, where nobody else can: its driver may have no handle of it.
    """
    faulthandler.dump_traceback_later(deadline_s * AT, file=file or sys.stderr, exit=ends)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def watched(deadline_s: float) -> Iterator[Callable[[], None]]:
    """Ends this actor's process, its stacks noted, once the block has not called what it is given for so long.

    As `noted` does, by a thread of C. `overdue` reads what was noted.
    """
    with _file(_logs(), ray.get_runtime_context().get_actor_id()).open("w") as file:

        def alive() -> None:
            faulthandler.dump_traceback_later(deadline_s, file=file, exit=True)

        alive()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()


def overdue(node: str, actor_id: str) -> str:
    """What an actor on a node had noted of itself as it was overdue; empty where it was not, or cannot be read."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return str(ray.get(_overdue.options(scheduling_strategy=there).remote(actor_id), timeout=READ_S))
    except RayError:  # there is no such file, too
        return ""


def _logs() -> Path:
    """Ray's own folder for logs, on this node."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


def _file(logs: Path, actor_id: str) -> Path:
    return logs / f"stacks-{actor_id}.txt"


def actor(plain: type, method: str, deadline_s: float) -> Any:
    """The actor class of a plain class. Calls of its `method` are watched, and `place` answers its `Place`."""

    class Watched(plain):
        def place(self) -> Place:
            if not hasattr(self, "_place"):
                context, logs = ray.get_runtime_context(), _logs()
                self._stacks = _file(logs, context.get_actor_id()).open("w")
                log = next(logs.glob(f"worker-{context.get_worker_id()}-*.err"), "")
                self._place = Place(context.get_node_id(), self._stacks.name, str(log))
            return self._place

    def watched(self: Any, *args: Any) -> Any:
        self.place()  # Ray starts an actor anew without its leave
        with noted(deadline_s, self._stacks):
            return getattr(plain, method)(self, *args)

    setattr(Watched, method, watched)
    Watched.__name__, Watched.__qualname__ = plain.__name__, plain.__qualname__  # as processes are called
    return ray.remote(Watched)


def read(node: str, file: str) -> str:
    """The end of a text file of a node, or one line that says why there is none."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return str(ray.get(_read.options(scheduling_strategy=there).remote(file), timeout=READ_S))
    except RayError as error:
        return f"{file} on node {node} cannot be read ({type(error).__name__})\n"


def stacks(place: Any) -> str:
    """What an actor is at, by its answer to `place`."""
    try:
        where = ray.get(place, timeout=READ_S)
    except RayError:  # not within its time, or not again
        return "it has not started"
    return read(where.node, where.stacks)


def last_lines(place: Place, lines: int = 10) -> str:
    """The end of an actor's log, without what Ray tells itself there."""
    said = read(place.node, place.log).splitlines()
    said = [line for line in said if not line.startswith((":job_id:", ":actor_name:"))]
    return "\n".join(said[-lines:])


@ray.remote(num_cpus=0)
def _read(file: str) -> str:
    return _end(file)


@ray.remote(num_cpus=0)
def _overdue(actor_id: str) -> str:
    return _end(str(_file(_logs(), actor_id)))


def _end(file: str) -> str:
    with open(file, "rb") as stream:
        stream.seek(max(os.path.getsize(file) - MOST_BYTES, 0))
        return stream.read().decode(errors="replace")
