"""The pool of rollout workers: bounded in flight, as large as its queue asks for, and alive when a worker dies.

  source of units ──▶ queue ──▶ [ at most in_flight_per_worker on each ready worker ] ──▶ files ──▶ keys, as they finish
     pulled when there is room     ▲                    │
                                   └── worker died or silent: its units, first in the queue again

  loop over    consumes              waits for                     is unblocked by
  _fill        the source            room in the queue             a unit that is handed to a worker
  _resize      length of the queue   nothing                       —
  _hand_out    the queue             a ready worker with room      a worker that starts, a unit that finishes
  _collect     answers               the first answer or start     an answer, or POLL_S: then deadlines are looked at

What is in memory does not depend on how many units there are. A unit whose file is already there is not sampled
again. Failures are told apart:

  a worker raises               a bug, or what a user can mend: the run stops with its message
  a worker dies or is silent    infrastructure: replaced; at most `rollout.retries` units may lose a worker
  a unit does so a second time  it is suspect, and its sessions are tried one by one
  a session does so by itself   data: it is set aside with its text, and counted
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from rgalign_ray import config, ray_metrics, ray_stacks, schema, storage
from rgalign_ray.errors import DataError, InfrastructureError, UserError, first_line
from rgalign_ray.rollout.worker import EMBEDDINGS, ProposalWorker, RolloutWorker, Unit

POLL_S = 1.0
NODE_LOSS_S = 60.0
"""Within which Ray notices that a node has died; until then whatever is put there dies as well."""
QUARANTINE = "quarantine"
"""Folder, beside the units' files, of sessions that were set aside."""
Worker = type[RolloutWorker] | type[ProposalWorker]


@dataclass(eq=False)
class _Task:
    """A unit on its way."""

    key: str
    unit: Unit
    losses: int = 0
    """Workers that died or fell silent over it."""


@dataclass(eq=False)
class _Member:
    """A worker, and what it has in hand."""

    actor: Any
    starting: Any
    """Its answer once it has started; None from then on."""
    since: float
    """When it was asked to start, was handed its oldest unfinished unit, or ran out of them."""
    calls: dict[Any, _Task] = field(default_factory=dict)
    """Unfinished calls, oldest first."""
    place: ray_stacks.Place = field(default_factory=ray_stacks.Place)
    """Where it runs, once it has started."""


class RolloutPool:
    """Runs units on `settings.min_workers` to `settings.workers` actors.

    Args:
        settings: size of the pool, deadlines and retries.
        worker_args: arguments of the worker.
        worker: `RolloutWorker`, or `ProposalWorker` for a teacher.
        python: interpreter of the workers, where it is not the driver's.

    Raises:
        InfrastructureError: from `run`, when more units lost a worker than `settings.retries`, or no worker started.
        DataError: from `run`, when more sessions than `settings.quarantine` had to be set aside.
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
        self.out_uri: str = worker_args["out_uri"]
        self.table = worker.TABLE
        self.deaths = 0
        self.quarantined: list[str] = []
        """Ids of the sessions that were set aside."""
        self._losers: set[str] = set()
        """Units that lost a worker and are not known to be at fault, and workers that died with none in hand. Of what a
        node that dies takes with it, the first."""
        self._struck: tuple[str, float] = ("", -math.inf)
        """Node, empty where the worker had not started, and time of the last loss that was one of its own."""
        self._actor_class = ray_stacks.actor(worker, "run", settings.deadline_s).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            label_selector=settings.node_labels,
            runtime_env={"py_executable": python} if python else None,
        )
        self._any_done = False
        """Whether a unit is done, in this run or before it: what ends a worker then may be the session."""
        self._looked = -math.inf
        """When the cluster was last asked for room."""
        self._requested = False
        """Whether the cluster has been told to grow."""
        self._members: list[_Member] = []
        self._queue: deque[_Task] = deque()
        self._behind: list[_Task] = []
        """Units that go last in the queue, once the source has filled it."""

    def run(self, units: Iterable[Unit], context: str) -> Iterator[tuple[str, int]]:
        """Yields (unit key, sessions) once each unit's files are written, in the order of completion.

        `context` stands for whatever else decides the result (weights, template, sampling settings): it
        is part of a unit's key. Sessions that are set aside are counted with those that are done.

        At its end files of an earlier try whose units this one did not meet are removed: of a unit that one try alone
        has cut, or for which a teacher was asked again, they hold the same sessions once more.
        """
        storage.delete(storage.join(self.out_uri, QUARANTINE))  # what an earlier try set aside is tried again
        met = set()
        for key, sessions in self._run(units, context):
            met.add(key)
            yield key, sessions
        for folder in (self.table, EMBEDDINGS):
            storage.keep_units(storage.join(self.out_uri, folder), met)

    def _run(self, units: Iterable[Unit], context: str) -> Iterator[tuple[str, int]]:
        self._context = context
        source = iter(units)
        more = True
        while True:
            while more and len(self._queue) < self._ahead:
                unit = next(source, None)
                more = unit is not None
                if unit is not None:
                    task = _Task(unit.key(context), unit)
                    if storage.exists(self._file(task.key)):
                        self._any_done = True
                        yield task.key, len(unit.session_ids)
                    else:
                        self._queue.append(task)
            self._queue.extend(self._behind)
            self._behind.clear()
            if not self._queue and not any(member.calls for member in self._members):
                return
            self._resize()
            self._hand_out()
            for task in self._collect():
                ray_metrics.counter("rollout_units").inc()
                ray_metrics.counter("rollout_sessions").inc(len(task.unit.session_ids))
                yield task.key, len(task.unit.session_ids)

    def close(self) -> None:
        """Ends the workers, so that their memory is free for the learners."""
        for member in self._members:
            ray.kill(member.actor)
        self._members = []
        self._queue.clear()
        if self._requested:
            self._request(0)
        ray_metrics.gauge("rollout_workers").set(0)
        ray_metrics.gauge("rollout_queue").set(0)

    @property
    def size(self) -> int:
        """Workers at present, those that are starting included."""
        return len(self._members)

    @property
    def _ahead(self) -> int:
        """Units that wait at most: enough to fill every worker, so that the queue tells how many are needed."""
        return self.settings.workers * self.settings.in_flight_per_worker

    def _file(self, key: str) -> str:
        return storage.join(self.out_uri, self.table, f"{key}.parquet")

    def _start(self) -> _Member:
        actor = self._actor_class.remote(**self.worker_args)
        return _Member(actor, actor.place.remote(), time.monotonic())

    def _resize(self) -> None:
        """Starts workers that the queue has work for and the cluster has room for; ends those that have had none."""
        settings, now = self.settings, time.monotonic()
        units = len(self._queue) + sum(len(member.calls) for member in self._members)
        least = min(settings.least_workers, units)
        wanted = min(max(math.ceil(units / settings.in_flight_per_worker), least), settings.workers)
        while len(self._members) < least:
            self._members.append(self._start())
        if len(self._members) < wanted and now - self._looked > POLL_S:
            self._looked = now
            self._members += [self._start() for _ in range(min(self._room(), wanted - len(self._members)))]
            if len(self._members) < wanted:  # a cluster that can grow learns what for
                self._request(wanted)
        for member in reversed(self._members):
            idle = not member.calls and member.starting is None and now - member.since > settings.idle_s
            if idle and not self._queue and len(self._members) > settings.least_workers:
                ray.kill(member.actor)
                self._members.remove(member)
        ray_metrics.gauge("rollout_workers").set(len(self._members))
        ray_metrics.gauge("rollout_queue").set(len(self._queue))

    @property
    def _asked(self) -> dict[str, float]:
        """Resources of one worker."""
        asked = {"CPU": self.settings.cpus_per_worker, "GPU": self.settings.gpus_per_worker}
        return {name: amount for name, amount in asked.items() if amount}

    def _request(self, workers: int) -> None:
        """Has a cluster that can grow make room for so many workers, and keep it until it is told otherwise."""
        request_resources(bundles=[self._asked] * workers, bundle_label_selectors=[self.settings.node_labels] * workers)
        self._requested = workers > 0

    def _room(self) -> int:
        """Workers that the cluster can take beside Ray Data, which would wait for ever for a CPU that actors hold."""
        free = ray.available_resources()
        free["CPU"] = free.get("CPU", 0.0) - config.DATA_CPUS
        room = int(min(free.get(name, 0.0) / amount for name, amount in self._asked.items()))
        starting = sum(member.starting is not None for member in self._members)
        return max(room - starting, 0)  # what has just been placed may still be told as free

    def _hand_out(self) -> None:
        """Units to the ready workers, first to those that have the fewest."""
        ready = [member for member in self._members if member.starting is None]
        for room in range(self.settings.in_flight_per_worker):
            for member in ready:
                if self._queue and len(member.calls) == room:
                    task = self._queue.popleft()
                    if not member.calls:
                        member.since = time.monotonic()
                    member.calls[member.actor.run.remote(task.unit, task.key)] = task

    def _collect(self) -> list[_Task]:
        """What finished within a poll; dead and overdue workers are replaced and their units queued again."""
        waiting = [call for member in self._members for call in member.calls]
        waiting += [member.starting for member in self._members if member.starting is not None]
        ray.wait(waiting, num_returns=1, timeout=POLL_S)
        arrived = set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        finished: list[_Task] = []
        for member in list(self._members):
            if member.starting in arrived:
                self._outcome(member, member.starting, finished)
            for call in [call for call in member.calls if call in arrived]:
                if not self._outcome(member, call, finished):
                    break
            late = time.monotonic() - member.since > self.settings.deadline_s
            if late and member.calls and member in self._members:
                self._save_stacks(member)
                self._lose(member, f"gave no answer for {self.settings.deadline_s:.0f} s", finished)
        self._none_starts()
        return finished

    def _outcome(self, member: _Member, call: Any, finished: list[_Task]) -> bool:
        """Takes one answer of a worker; False where it has died."""
        try:
            answer = ray.get(call, timeout=POLL_S)
        except (RayActorError, WorkerCrashedError, OutOfMemoryError) as error:  # the last from Ray's memory monitor
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise  # it raised before its first unit, and every other one would
            self._lose(member, f"died ({first_line(error)})", finished)
            return False
        except RayTaskError as error:
            if isinstance(error.cause, (UserError, InfrastructureError)):
                raise error.cause from None  # what the worker itself said, without Ray's account of it
            bug = error.as_instanceof_cause()
            if call is not member.starting:
                bug.add_note(f"The last lines of the worker's log:\n{ray_stacks.last_lines(member.place)}")
            raise bug from None
        if call is member.starting:
            member.starting, member.place = None, answer
        else:
            finished.append(member.calls.pop(call))
            self._any_done = True
        member.since = time.monotonic()
        return True

    def _lose(self, member: _Member, why: str, finished: list[_Task]) -> None:
        """Ends a worker. What it was at is to blame or unlucky; what it had not begun goes first in the queue.

        While no unit is done, what it was at goes last: one session must not hide that workers can work.
        """
        self.deaths += 1
        ray_metrics.counter("rollout_deaths").inc()
        self._members.remove(member)
        ray.kill(member.actor)
        tasks = list(member.calls.values())
        finished += [task for task in tasks if storage.exists(self._file(task.key))]  # done, and not heard of
        self._any_done |= bool(finished)
        tasks = [task for task in tasks if task not in finished]
        at, rest = (tasks[0], tasks[1:]) if tasks else (None, [])
        again: list[_Task] = []
        if at is None or not self._any_done:  # where none can work, no session is at fault
            if at is not None or not self._with_its_node(member):
                self._losers.add(f"worker {self.deaths}")
            self._behind += [at] if at else []
        elif at.losses < (1 if len(at.unit.session_ids) > 1 else 2):
            at.losses += 1
            if not self._with_its_node(member):
                self._losers.add(at.key)
            again = [at]
        elif len(at.unit.session_ids) > 1:
            self._losers.discard(at.key)
            parts = [_Task(part.key(self._context), part, losses=2) for part in at.unit.singly()]
            again = [task for task in parts if not storage.exists(self._file(task.key))]
            finished += [task for task in parts if task not in again]
        else:
            self._losers.discard(at.key)
            self._set_aside(at, why)
            finished.append(at)
        self._queue.extendleft(reversed([*again, *rest]))
        if len(self._losers) > self.settings.retries:
            raise InfrastructureError(
                f"rollout: a worker {why}; loss {len(self._losers)}, with rollout.retries = {self.settings.retries}; "
                "the same command resumes from the units that are done."
            )

    def _with_its_node(self, member: _Member) -> bool:
        """Whether a worker that is lost was so with the node of the loss before it, as far as can be known."""
        node, now = member.place.node, time.monotonic()
        struck, when = self._struck
        if now - when < NODE_LOSS_S and node in ("", struck):
            return True
        self._struck = node, now
        return False

    def _set_aside(self, task: _Task, why: str) -> None:
        [session], [text] = task.unit.session_ids, task.unit.texts
        self.quarantined.append(session)
        ray_metrics.counter("rollout_quarantined").inc()
        row = {"session_id": session, "text": text, "reason": f"over it, a worker {why}"}
        place = storage.join(self.out_uri, QUARANTINE, f"{task.key}.parquet")
        storage.write_table(place, pa.Table.from_pylist([row], schema=schema.SET_ASIDE))
        if len(self.quarantined) > self.settings.quarantine:
            raise DataError(
                f"rollout: {len(self.quarantined)} sessions end every worker that reads them, with rollout.quarantine "
                f"= {self.settings.quarantine}; their texts are in {storage.join(self.out_uri, QUARANTINE)}."
            )

    def _none_starts(self) -> None:
        """Raises where all wait to start, and have for too long."""
        pending = [time.monotonic() - member.since for member in self._members if member.starting is not None]
        if len(pending) < len(self._members) or not pending or min(pending) <= self.settings.deadline_s:
            return
        free, settings = ray.available_resources(), self.settings
        raise InfrastructureError(
            f"rollout: none of {len(pending)} workers has started within {settings.deadline_s:.0f} s. Each asks for "
            f"{settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs; free are {free.get('CPU', 0):g} "
            f"and {free.get('GPU', 0):g}."
        )

    def _save_stacks(self, member: _Member) -> None:
        """What a silent worker was at, from the file that it wrote beside its work."""
        stacks = ray_stacks.read(member.place.node, member.place.stacks)
        at = next(iter(member.calls.values()))
        storage.write_bytes(storage.join(self.out_uri, ray_stacks.STACKS, f"{at.key}.txt"), stacks.encode())
