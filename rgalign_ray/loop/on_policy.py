"""RG-GRPO over actors: samplers, the judge and the learners each in processes of their own.

OnPolicyStream (rollout/on_policy.py: who may sample what, and how stale)
   │ tasks                         ▲ judged groups              │ judged groups      ▲ weights
   ▼                               │                            ▼                    │
samplers ──groups──▶ the judge: frozen encoder and ranker     learners: Ray Train, TRL, DeepSpeed

loop over      consumes            waits for                       is unblocked by
a sampler      tasks               an admitted task, the judge     published weights; the judge's answer
the judge      groups              nothing                         —
a learner      judged groups       all groups of its step          the last sampler that is done with them
the keeper     ends of samplers    one that dies or hangs, the fit a death: what it had goes to others
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rgalign_ray import progress, ray_stacks, storage
from rgalign_ray.config import Config, Grpo
from rgalign_ray.errors import InfrastructureError, first_line
from rgalign_ray.learner import training
from rgalign_ray.learner.engine import LearnerTask, Stream
from rgalign_ray.learner.groups import Judge, Sampler
from rgalign_ray.learner.groups import plan as plan_of
from rgalign_ray.loop.readers import interpreter
from rgalign_ray.rollout.on_policy import OnPolicyStream, Task

POLL_S = 1.0
WAIT = 3.0
"""Deadlines of a rollout unit that one may wait for another: sampling, what must come before it, and a sampler that
hangs."""


class SamplerActor:
    """Samples what the stream says until it is ended; the thin wrapper of `Sampler`."""

    def __init__(self, task: LearnerTask, steps: Sequence[Sequence[str]]) -> None:
        self.sampler = Sampler(task, steps)
        self.patience = task.rollout.deadline_s

    def work(self, name: str, stream: Any, judge: Any) -> NoReturn:
        """
        Raises:
            InfrastructureError: when there is nothing to sample for long: the learners have stopped.
        """
        while True:
            try:
                job = ray.get(stream.next.remote(name), timeout=2 * WAIT * self.patience)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from None
            if job is not None:
                self.do(job, name, stream, judge)

    def do(self, job: Task, name: str, stream: Any, judge: Any) -> None:
        try:
            self.sampler.take(job.weights)
        except Exception:  # of whatever reads a file that is being taken away
            if ray.get(stream.wants.remote(name, job), timeout=self.patience):
                raise
            return
        groups = self.sampler.sample(job.step, job.places)
        judged = ray.get(judge.judge.remote(job.session_ids, groups), timeout=self.patience)
        ray.get(stream.put.remote(name, job, judged), timeout=self.patience)


def fit(
    task: LearnerTask,
    config: Config,
    steps: int,
    storage_uri: str,
    name: str,
    checkpoint_every_s: float = training.CHECKPOINT_EVERY_S,
) -> dict[str, Any]:
    """As `training.fit`, with groups from samplers and a judge that run beside the learners.

    The judge reads queries as the encode pass reads sessions, so it is placed as one of its workers. A sampler that
    dies, or is at one task for longer than `rollout.deadline_s`, is replaced and its task sampled by another, within
    `rollout.retries`.

    Raises:
        InfrastructureError: when more of them died, or one waits in vain, as while the learners have no room.
    """
    assert isinstance(task.optimisation, Grpo)
    plan = plan_of(task)
    stream_name = f"{name}-{uuid.uuid4().hex[:8]}"  # of this try alone: an actor's name is taken until it is gone
    weights = storage.join(storage_uri, f"{name}.weights")
    settings = config.rollout
    stream = (
        ray.remote(OnPolicyStream)
        .options(name=stream_name, num_cpus=0)
        .remote(plan, task.optimisation.staleness, settings.unit_sessions, WAIT * settings.deadline_s)
    )
    reads = config.encode
    judge = (
        ray.remote(Judge)
        .options(
            num_cpus=reads.cpus_per_worker,
            num_gpus=reads.gpus_per_worker,
            label_selector=reads.node_labels,
            max_restarts=3,
            max_task_retries=3,
        )
        .remote(task, on_gpu=reads.gpus_per_worker > 0)
    )
    keeper = Keeper(task, config, plan, stream, judge, storage.join(storage_uri, f"{name}.{ray_stacks.STACKS}"))
    try:
        with keeper:
            stream_task = replace(task, stream=Stream(stream_name, weights))
            figures = training.fit(stream_task, steps, storage_uri, name, checkpoint_every_s, keeper.check)
        storage.delete(weights)
        return figures | {"sampler_deaths": keeper.deaths}
    except Exception:
        if keeper.failure is not None:  # learners that wait for groups only know that they waited
            raise keeper.failure from None
        raise
    finally:
        for actor in (stream, judge):
            ray.kill(actor)


@dataclass(frozen=True, slots=True)
class _Member:
    """A sampler at work."""

    name: str
    actor: Any
    place: Any
    """Its answer with the place of its stacks."""


class Keeper:
    """Keeps samplers at work while the block runs: one that dies or hangs is replaced, and what it had goes to others.

    Args:
        task: the objective's work.
        config: `rollout` says how many samplers, where, and with how much patience.
        plan: session ids of each optimiser step.
        stream: the actor that says what to sample.
        judge: the actor that judges it.
        stacks_uri: folder of what samplers that hung were at.
    """

    def __init__(
        self,
        task: LearnerTask,
        config: Config,
        plan: Sequence[Sequence[str]],
        stream: Any,
        judge: Any,
        stacks_uri: str,
    ) -> None:
        self.settings = config.rollout
        self.arguments = (task, plan)
        self.stream, self.judge, self.stacks_uri = stream, judge, stacks_uri
        self.deaths = 0
        self.failure: Exception | None = None
        self._over = threading.Event()
        python = interpreter(config, task.reasoner.engine)
        self._thread = threading.Thread(target=self._keep, name="keeper of samplers", daemon=True)
        self._actor = ray_stacks.actor(SamplerActor, "do", self.settings.deadline_s).options(
            num_cpus=self.settings.cpus_per_worker,
            num_gpus=self.settings.gpus_per_worker,
            label_selector=self.settings.node_labels,
            runtime_env={"py_executable": python} if python else None,
        )
        self._at_work: dict[Any, _Member] = {}

    def __enter__(self) -> Keeper:
        for number in range(self.settings.workers):
            self._start(f"sampler-{number}")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=10 * POLL_S)
        self._kill()

    def check(self) -> None:
        """Raises what has ended the samplers' work."""
        if self.failure is not None:
            raise self.failure

    def _start(self, name: str) -> None:
        actor = self._actor.remote(*self.arguments)
        place = actor.place.remote()
        self._at_work[actor.work.remote(name, self.stream, self.judge)] = _Member(name, actor, place)

    def _kill(self) -> None:
        for member in list(self._at_work.values()):
            ray.kill(member.actor)

    def _keep(self) -> None:
        try:
            while not self._over.is_set():
                ended, _ = ray.wait(list(self._at_work), num_returns=1, timeout=POLL_S)
                for call in ended:
                    self._ended(call)
                self._replace_silent()
        except Exception as error:  # of any kind: the learners must not wait for groups that never come
            self.failure = error
            ray.kill(self.stream)
            self._kill()

    def _ended(self, call: Any) -> None:
        try:
            ray.get(call, timeout=POLL_S)
        except (RayActorError, OutOfMemoryError) as error:  # the last from Ray's memory monitor
            if isinstance(error, RayTaskError):  # it lives, and met the death of another
                raise InfrastructureError(
                    f"RG-GRPO: the judge, or the stream of groups, died for good ({first_line(error)}); the same "
                    "command tries again."
                ) from None
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise
            self._lose(call, f"died ({first_line(error)})")
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None

    def _replace_silent(self) -> None:
        patience = self.settings.deadline_s
        asked = self.stream.silent.remote(patience)
        if not ray.wait([asked], timeout=POLL_S)[0]:
            return  # the stream has still to start, and has handed out nothing
        for name in ray.get(asked, timeout=POLL_S):
            [(call, member)] = [each for each in self._at_work.items() if each[1].name == name]
            stacks = storage.join(self.stacks_uri, f"{name}.txt")
            storage.write_bytes(stacks, ray_stacks.stacks(member.place).encode())
            why = f"gave no answer for {patience:.0f} s; what it was at stands in {stacks}"
            progress.note(f"RG-GRPO: sampler {name} {why}")
            self._lose(call, why)

    def _lose(self, call: Any, why: str) -> None:
        """Ends a sampler, and starts another in its place."""
        member = self._at_work.pop(call)
        ray.kill(member.actor)
        self.deaths += 1
        if self.deaths > self.settings.retries:
            raise InfrastructureError(
                f"RG-GRPO: sampler {member.name} {why}; death {self.deaths}, with rollout.retries = "
                f"{self.settings.retries}."
            )
        ray.get(self.stream.lose.remote(member.name), timeout=self.settings.deadline_s)
        self._start(f"{member.name}'")
