"""The pool of rollout workers: bounded in flight, and alive when a worker dies.

  units ──▶ [ at most in_flight_per_worker on each worker ] ──▶ files of the artefact ──▶ keys, as they finish

A unit whose file is already there is not sampled again. A worker that dies or stays silent past its
deadline is replaced, and its units go back to the front of the queue; a worker that raises has met a
bug, and the run stops with its message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from rgalign_ray import config, storage
from rgalign_ray.errors import InfrastructureError, UserError
from rgalign_ray.rollout.worker import ProposalWorker, RolloutWorker, Unit

POLL_S = 1.0
Worker = type[RolloutWorker] | type[ProposalWorker]


@dataclass
class _Member:
    actor: Any
    started: float
    """When its oldest unfinished call was sent; the deadline counts from here."""
    calls: dict[Any, str] = field(default_factory=dict)
    """Unfinished calls, oldest first: reference → unit key."""


class RolloutPool:
    """Runs units on `settings.workers` actors.

    Args:
        settings: size of the pool, deadlines and retries.
        worker_args: arguments of the worker.
        worker: `RolloutWorker`, or `ProposalWorker` for a teacher.
        python: interpreter of the workers, where it is not the driver's.

    Raises:
        InfrastructureError: from `run`, when workers died more often than `settings.retries`.
    """

    def __init__(
        self,
        settings: config.Rollout,
        worker_args: dict[str, Any],
        worker: Worker = RolloutWorker,
        python: str | None = None,
    ) -> None:
        self.settings = settings
        self.worker_args = worker_args
        self.table = worker.TABLE
        self.deaths = 0
        self._actor_class = ray.remote(worker).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            runtime_env={"py_executable": python} if python else None,
        )
        self._members: list[_Member] = []

    def run(self, units: Sequence[Unit], context: str) -> Iterator[tuple[str, int]]:
        """Yields (unit key, sessions) once each unit's files are written, in the order of completion.

        `context` stands for whatever else decides the result (weights, template, sampling settings): it
        is part of a unit's key.
        """
        keys = {unit.key(context): unit for unit in units}
        done = {key for key in keys if storage.exists(self._file(key))}
        yield from ((key, len(keys[key].session_ids)) for key in keys if key in done)
        queue = deque(key for key in keys if key not in done)
        self._members = [self._start() for _ in range(min(self.settings.workers, len(queue)))]
        while queue or any(member.calls for member in self._members):
            for member in self._members:
                while queue and len(member.calls) < self.settings.in_flight_per_worker:
                    key = queue.popleft()
                    if not member.calls:
                        member.started = time.monotonic()
                    member.calls[member.actor.run.remote(keys[key], key)] = key
            for key in self._collect(queue):
                yield key, len(keys[key].session_ids)

    def close(self) -> None:
        """Ends the workers, so that their memory is free for the learners."""
        for member in self._members:
            ray.kill(member.actor)
        self._members = []

    def _start(self) -> _Member:
        return _Member(self._actor_class.remote(**self.worker_args), time.monotonic())

    def _file(self, key: str) -> str:
        return storage.join(self.worker_args["out_uri"], self.table, f"{key}.parquet")

    def _collect(self, queue: deque[str]) -> list[str]:
        """Keys finished within a poll; dead and overdue workers are replaced and their units queued again."""
        calls = [call for member in self._members for call in member.calls]
        ready, _ = ray.wait(calls, num_returns=1, timeout=POLL_S)
        finished = []
        for place, member in enumerate(self._members):
            for call in [c for c in ready if c in member.calls]:
                try:
                    ray.get(call, timeout=POLL_S)
                except (RayActorError, WorkerCrashedError) as error:
                    if isinstance(error, RayActorError) and error.actor_init_failed:
                        raise  # it raised before its first unit, and every other one would
                    self._replace(place, queue, f"died ({str(error).splitlines()[0]})")
                    break
                except RayTaskError as error:
                    if isinstance(error.cause, (UserError, InfrastructureError)):
                        raise error.cause from None  # what the worker itself said, without Ray's account of it
                    raise error.as_instanceof_cause() from None
                finished.append(member.calls.pop(call))
                member.started = time.monotonic()
            if member.calls and time.monotonic() - member.started > self.settings.deadline_s:
                self._replace(place, queue, f"gave no answer for {self.settings.deadline_s:.0f} s")
        return finished

    def _replace(self, place: int, queue: deque[str], why: str) -> None:
        member = self._members[place]
        self.deaths += 1
        if self.deaths > self.settings.retries:
            raise InfrastructureError(
                f"rollout: a worker {why}; death {self.deaths}, with rollout.retries = {self.settings.retries}; "
                "the same command resumes from the units that are done."
            )
        queue.extendleft(reversed(member.calls.values()))
        member.calls = {}
        ray.kill(member.actor)
        self._members[place] = self._start()
