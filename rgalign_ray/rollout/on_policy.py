"""Groups on their way from those who sample to those who learn from them, no staler than is said.

  steps of the plan ──admitted──▶ samplers ──groups──▶ here ──▶ learners ──▶ one optimiser step ──┐
        ▲                         (version of                                                     │
        │                          the weights)                                                   │
        └──────────── weights after t steps are published as version t ◀─────────────────────────┘

  who        consumes            waits for                                  is unblocked by
  sampler    units of a step     a step that is admitted                    published weights, a unit given back
  learner    a step's groups     all groups of its own sessions             a sampler that is done with them
  publisher  nothing             nothing                                    —

*The bound.* Step t (from 0) is admitted once version t − S has been published, and is sampled with exactly that
version (version 0 where t < S). When its groups are learned from, the weights have version t, so that a sample lags by
S versions: never more, and never fewer but in the first S steps. It does not depend on who is slow, and no sample is
thrown away for being stale. S = 0 is synchronous; with S = 1 step t + 1 is sampled while step t is learned from.

*What is held.* Version t − S exists only after step t − S − 1 was learned from, so that at most S + 1 steps are in
work: memory does not grow with the plan.

*The invariant.* Sessions of admitted steps = waiting + with a sampler + done and not yet taken + taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgalign_ray.errors import InfrastructureError


@dataclass(frozen=True, slots=True)
class Task:
    """Sessions of one step that are sampled together, with the weights of one version."""

    number: int
    step: int
    places: tuple[int, ...]
    """In the step's list of sessions, which may name one twice."""
    session_ids: tuple[str, ...]
    version: int
    weights: str | None
    """Where the weights are; None: those that the objective starts from."""


class OnPolicyStream:
    """The books of one objective's groups; a plain class on one event loop, which Ray makes an actor.

    Args:
        plan: session ids of each optimiser step.
        staleness: S.
        unit_sessions: sessions of one task.
        deadline_s: longest wait of a learner for its groups, and of a sampler for a step.
    """

    def __init__(
        self, plan: Sequence[Sequence[str]], staleness: int, unit_sessions: int, deadline_s: float = 600.0
    ) -> None:
        self.plan = plan
        self.staleness = staleness
        self.unit_sessions = unit_sessions
        self.deadline_s = deadline_s
        self._changed = asyncio.Condition()
        self._gone: set[str] = set()
        """Samplers that were lost: Ray does not end the calls of a process that died, and they would still take."""
        self._since: dict[str, float] = {}
        """When each sampler was handed what it is at, be it from before the learners' last beginning."""
        self._beginnings = 0
        self._begin(0, {})

    def _begin(self, step: int, weights: Mapping[int, str]) -> None:
        self._beginnings += 1
        self.version = max(step - 1, 0)
        self._weights: dict[int, str | None] = {0: None, **weights}
        self._admitted = step
        self._tasks = 0
        self._waiting: list[Task] = []
        self._with: dict[str, Task] = {}
        """The task of each sampler."""
        self._groups: dict[tuple[int, int], Any] = {}
        """Groups that are done and not taken, by step and place."""
        self._taken = sum(len(sessions) for sessions in self.plan[:step])
        self._admit()

    async def restart(self, step: int, weights: Mapping[int, str]) -> None:
        """Begins at a step: the learners have died, and go on from their last state.

        Args:
            step: that they take next, and publish the weights of, unless it is the first.
            weights: of the `staleness` versions before `step`, by version, as far as they are not version 0.
        """
        async with self._changed:
            self._begin(step, weights)
            self._changed.notify_all()

    async def next(self, sampler: str) -> Task | None:
        """The next task for a sampler, by the order of steps; None: there is none yet, ask again.

        When all has been taken there may be one yet: the learners can still die, and go on from an earlier step. A
        sampler that asks again without an answer to its last task has lost it, and gets it again. One that is lost gets
        none.

        Raises:
            InfrastructureError: when no step is admitted for `deadline_s` though some are left.
        """
        async with self._changed:
            self._since.pop(sampler, None)
            self._take_back(sampler)
            try:
                async with asyncio.timeout(self.deadline_s):
                    await self._changed.wait_for(lambda: self._waiting or sampler in self._gone)
            except TimeoutError:
                if self._taken == sum(map(len, self.plan)):
                    return None
                raise InfrastructureError(
                    f"{sampler}: no step was admitted within {self.deadline_s:g} s; the learners, at version "
                    f"{self.version}, publish nothing. {self.counts}"
                ) from None
            if sampler in self._gone:
                return None
            task = self._waiting.pop(0)
            self._with[sampler] = task
            self._since[sampler] = asyncio.get_running_loop().time()
            return task

    async def put(self, sampler: str, task: Task, groups: Sequence[Any]) -> bool:
        """Takes the groups of a task, in the order of its places; False where another sampler has done it since."""
        async with self._changed:
            self._since.pop(sampler, None)
            if self._with.get(sampler) != task:
                return False
            del self._with[sampler]
            self._groups |= {(task.step, place): group for place, group in zip(task.places, groups, strict=True)}
            self._changed.notify_all()
            return True

    async def wants(self, sampler: str, task: Task) -> bool:
        """Whether a task is still the sampler's. After a new beginning it is not, and its weights may be gone."""
        return self._with.get(sampler) == task

    async def silent(self, patience_s: float) -> list[str]:
        """Samplers that have been at one task for longer than `patience_s`."""
        now = asyncio.get_running_loop().time()
        return [sampler for sampler, since in self._since.items() if now - since > patience_s]

    async def lose(self, sampler: str) -> None:
        """What a sampler that is gone had in hand is for others, and nothing is for it; another needs another name."""
        async with self._changed:
            self._gone.add(sampler)
            self._since.pop(sampler, None)
            self._take_back(sampler)
            self._changed.notify_all()

    async def take(self, step: int, places: Sequence[int]) -> list[Any]:
        """A learner's groups of a step; each is handed out once.

        Raises:
            InfrastructureError: when they are not there by the deadline; it tells what is missing, and with whom. And
                when learners have begun anew since: the groups are theirs.
        """
        wanted = [(step, place) for place in places]
        async with self._changed:
            beginning = self._beginnings

            def over() -> bool:
                return self._beginnings > beginning

            try:
                async with asyncio.timeout(self.deadline_s):
                    await self._changed.wait_for(lambda: over() or all(key in self._groups for key in wanted))
            except TimeoutError:
                raise InfrastructureError(self._missing(wanted)) from None
            if over():
                raise InfrastructureError(f"step {step}: the learners that asked for its groups have been replaced.")
            self._taken += len(wanted)
            return [self._groups.pop(key) for key in wanted]

    async def publish(self, version: int, weights: str, kept: int) -> list[str]:
        """Takes weights after `version` optimiser steps; returns where those are that nobody asks for any more.

        Args:
            version: one more than the last.
            weights: where they are.
            kept: optimiser steps of the state from which the learners would go on, were they to die now.
        """
        async with self._changed:
            if version != self.version + 1:
                raise ValueError(f"version {version} after {self.version}")
            self.version = version
            self._weights[version] = weights
            self._admit()
            in_work = [task.version for task in (*self._waiting, *self._with.values())]
            oldest = min([version, *(step - self.staleness for step in (self._admitted, kept)), *in_work])
            old = [each for each in self._weights if each < oldest]
            self._changed.notify_all()
            return [uri for each in old if (uri := self._weights.pop(each)) is not None]

    @property
    def counts(self) -> dict[str, int]:
        """Sessions by where they are: `admitted` is the sum of the others."""
        return {
            "admitted": sum(len(step) for step in self.plan[: self._admitted]),
            "waiting": sum(len(task.places) for task in self._waiting),
            "sampling": sum(len(task.places) for task in self._with.values()),
            "done": len(self._groups),
            "taken": self._taken,
        }

    def _admit(self) -> None:
        """Cuts into tasks what the bound lets in."""
        while self._admitted < len(self.plan) and self._admitted - self.staleness <= self.version:
            step, sessions = self._admitted, self.plan[self._admitted]
            version = max(step - self.staleness, 0)
            for start in range(0, len(sessions), self.unit_sessions):
                places = tuple(range(start, min(start + self.unit_sessions, len(sessions))))
                ids = tuple(sessions[place] for place in places)
                self._waiting.append(Task(self._tasks, step, places, ids, version, self._weights[version]))
                self._tasks += 1
            self._admitted += 1

    def _take_back(self, sampler: str) -> None:
        task = self._with.pop(sampler, None)
        if task is not None:
            self._waiting.append(task)
            self._waiting.sort(key=lambda each: each.number)

    def _missing(self, wanted: Sequence[tuple[int, int]]) -> str:
        step, missing = wanted[0][0], sum(key not in self._groups for key in wanted)
        held = [name for name, task in self._with.items() if task.step == step]
        at = f"with {', '.join(held)}" if held else "with no sampler"
        return (
            f"step {step}: {missing} of {len(wanted)} groups were not sampled within {self.deadline_s:g} s; they are "
            f"{at}. {self.counts}"
        )
