"""The stream of groups keeps its bound, loses nothing and doubles nothing, whoever is slow or dies."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.errors import InfrastructureError
from rgalign_ray.rollout.on_policy import OnPolicyStream, Task

Wait = Callable[[], Awaitable[None]]


def plan(steps: int, sessions: int) -> list[list[str]]:
    """Sessions come again in later steps, and the last of a step is its first once more."""
    return [[f"s{place % max(sessions - 1, 1)}" for place in range(sessions)] for _ in range(steps)]


class Run:
    """Samplers and learners around one stream, each after waits of its own."""

    def __init__(self, stream: OnPolicyStream, seed: int, deaths: int, falls: int, keeps: float) -> None:
        self.stream = stream
        self.draw = random.Random(seed)
        self.deaths = deaths
        """Of samplers."""
        self.falls = falls
        """Times that all learners die, and go on from the last state they kept."""
        self.keeps = keeps
        """How often they keep one."""
        self.learned: dict[int, list[str]] = {}
        self.lags: list[int] = []
        self.sampled: Counter[tuple[int, int]] = Counter()
        self.held = 0
        self.gone: set[str] = set()
        self.fallen = False

    async def wait(self) -> None:
        for _ in range(self.draw.choice([0, 0, 1, 3, 20])):
            await asyncio.sleep(0)

    def note(self) -> None:
        counts = self.stream.counts
        assert counts["admitted"] == sum(counts.values()) - counts["admitted"]
        self.held = max(self.held, counts["admitted"] - counts["taken"])

    async def sampler(self, name: str) -> None:
        while True:
            task = await self.stream.next(name)
            assert task is not None
            assert task.version <= self.stream.version, "weights that exist"
            assert task.weights == (f"weights {task.version}" if task.version else None)
            await self.wait()
            if self.deaths and self.draw.random() < 0.2:
                self.deaths -= 1
                await self.stream.lose(name)
                name += "'"
                continue
            if task.weights in self.gone:
                assert not await self.stream.wants(name, task), "nobody takes weights away that are still needed"
                continue
            taken = await self.stream.put(name, task, [f"{i} by {task.version}" for i in task.session_ids])
            assert taken or self.fallen, "only what was asked for before a new beginning is not taken"
            self.sampled.update((task.step, place) for place in task.places if taken)
            self.note()

    async def learner(self, ranks: int) -> None:
        step = kept = 0
        while step < len(self.stream.plan):
            if step:
                self.gone.discard(f"weights {step}")
                self.gone |= set(await self.stream.publish(step, f"weights {step}", kept))
                self.note()
            places = range(len(self.stream.plan[step]))
            shares = [range(rank, len(places), ranks) for rank in range(ranks)]
            await self.wait()
            if self.fall():
                step = await self.from_(kept)
                continue
            taken = await asyncio.gather(*(self.stream.take(step, share) for share in shares))
            groups = dict(zip([p for share in shares for p in share], [g for part in taken for g in part], strict=True))
            self.learned[step] = [groups[place] for place in places]
            self.lags += [step - int(group.split()[-1]) for group in self.learned[step]]
            await self.wait()
            step += 1
            if self.draw.random() < self.keeps:
                kept = step
            if self.fall():
                step = await self.from_(kept)

    def fall(self) -> bool:
        falls = self.falls > 0 and self.draw.random() < 0.3
        self.falls -= falls
        return falls

    async def from_(self, kept: int) -> int:
        """The learners' new beginning, with what they find."""
        weights = {version: f"weights {version}" for version in range(max(kept - self.stream.staleness, 1), kept)}
        assert not self.gone & set(weights.values()), "nobody takes weights away that a new try begins with"
        self.fallen = True
        await self.stream.restart(kept, weights)
        return kept

    async def all(self, samplers: int, ranks: int) -> None:
        working = [asyncio.create_task(self.sampler(f"sampler {i}")) for i in range(samplers)]
        learning = asyncio.create_task(self.learner(ranks))
        await asyncio.wait([learning, *working], timeout=5, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            task.cancel()
        for ended in await asyncio.gather(*working, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise ended
        assert learning.done(), f"it hangs: {self.stream.counts}"
        learning.result()


@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 7),
    sessions=st.integers(1, 7),
    unit=st.integers(1, 4),
    staleness=st.integers(0, 3),
    samplers=st.integers(1, 4),
    ranks=st.integers(1, 3),
    deaths=st.integers(0, 3),
    falls=st.integers(0, 3),
    keeps=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_timing(
    seed: int,
    steps: int,
    sessions: int,
    unit: int,
    staleness: int,
    samplers: int,
    ranks: int,
    deaths: int,
    falls: int,
    keeps: float,
) -> None:
    work = plan(steps, sessions)

    async def run() -> Run:
        made = Run(OnPolicyStream(work, staleness, unit), seed, deaths, falls, keeps)
        await made.all(samplers, min(ranks, sessions))
        return made

    made = asyncio.run(run())
    expected = {step: [f"{session} by {max(step - staleness, 0)}" for session in work[step]] for step in range(steps)}
    assert made.learned == expected, "the same whoever was slow: version and sessions of every step"
    assert max(made.lags) <= staleness
    assert made.held <= (staleness + 1) * sessions
    if not made.fallen:
        assert set(made.sampled.values()) == {1}, "what a dead sampler had begun was never delivered"
    if keeps == 1.0 and not made.fallen:
        assert len(made.gone) >= steps - staleness - 2, "no more weights are kept than can still be asked for"
    assert made.stream.counts == {
        "admitted": steps * sessions, "waiting": 0, "sampling": 0, "done": 0, "taken": steps * sessions
    }  # fmt: skip


def test_one_step_ahead_is_sampled_while_the_last_is_learned_from() -> None:
    async def run(staleness: int) -> Task | None:
        stream = OnPolicyStream(plan(3, 2), staleness, 2)
        first = await stream.next("a")
        assert first is not None and (first.step, first.version, first.weights) == (0, 0, None)
        assert await stream.put("a", first, ["x", "y"])
        assert await stream.take(0, [0, 1]) == ["x", "y"]
        try:
            return await asyncio.wait_for(stream.next("a"), 0.05)
        except TimeoutError:
            return None

    ahead = asyncio.run(run(1))
    assert ahead is not None and (ahead.step, ahead.version) == (1, 0)
    assert asyncio.run(run(0)) is None, "it waits for the weights of the step before"


def test_a_late_answer_of_a_sampler_that_was_given_up_is_not_taken() -> None:
    async def run() -> None:
        stream = OnPolicyStream(plan(1, 1), 0, 1)
        task = await stream.next("slow")
        assert task is not None
        await stream.lose("slow")
        again = await stream.next("other")
        assert again == task
        assert not await stream.put("slow", task, ["late"])
        assert await stream.put("other", task, ["in time"])
        assert not await stream.put("other", task, ["twice"])
        assert await stream.take(0, [0]) == ["in time"]

    asyncio.run(run())


def test_a_sampler_that_died_while_it_waited_takes_nothing() -> None:
    """Its call lives on: Ray ends none when who made it dies."""

    async def run() -> None:
        stream = OnPolicyStream(plan(2, 1), 0, 1)
        task = await stream.next("a")
        assert task is not None
        await stream.put("a", task, ["x"])
        dead = asyncio.create_task(stream.next("dead"))
        await asyncio.sleep(0.01)
        await stream.lose("dead")
        other = asyncio.create_task(stream.next("other"))
        await stream.take(0, [0])
        await stream.publish(1, "weights", 0)
        taken = await asyncio.wait_for(other, 1)
        assert taken is not None and taken.step == 1
        assert await asyncio.wait_for(dead, 1) is None
        assert await asyncio.wait_for(stream.next("dead"), 1) is None, "nor where its call comes after its end"

    asyncio.run(run())


def test_a_learner_that_died_while_it_waited_takes_nothing() -> None:
    async def run() -> None:
        stream = OnPolicyStream(plan(1, 1), 0, 1)
        dead = asyncio.create_task(stream.take(0, [0]))
        await asyncio.sleep(0.01)
        await stream.restart(0, {})
        task = await stream.next("a")
        assert task is not None
        await stream.put("a", task, ["x"])
        assert await asyncio.wait_for(stream.take(0, [0]), 1) == ["x"]
        with pytest.raises(InfrastructureError, match=r"step 0: the learners that asked for its groups"):
            await dead

    asyncio.run(run())


def test_a_sampler_is_silent_that_has_a_task_for_long_whatever_becomes_of_the_learners() -> None:
    async def run() -> None:
        stream = OnPolicyStream(plan(2, 3), 0, 1)
        waiting = asyncio.create_task(stream.next("waits"))
        tasks = {"waits": await waiting} | {name: await stream.next(name) for name in ("puts", "hangs")}
        for name in ("waits", "puts"):
            task = tasks[name]
            assert task is not None
            await stream.put(name, task, ["x"])
        waiting = asyncio.create_task(stream.next("waits"))
        await asyncio.sleep(0.02)
        assert await stream.silent(0.01) == ["hangs"]
        assert await stream.silent(60.0) == []
        await stream.restart(0, {})
        assert await waiting is not None
        assert await stream.silent(0.01) == ["hangs"]
        await stream.lose("hangs")
        assert await stream.silent(0.01) == []

    asyncio.run(run())


def test_a_learner_that_waits_in_vain_says_for_whom() -> None:
    async def run() -> None:
        stream = OnPolicyStream(plan(1, 3), 0, 2, deadline_s=0.05)
        await stream.next("node-7/sampler-2")
        with pytest.raises(InfrastructureError, match=r"step 0: 3 of 3 groups .* with node-7/sampler-2\."):
            await stream.take(0, [0, 1, 2])

    asyncio.run(run())


def test_a_sampler_without_a_step_says_for_whom_it_waits_unless_all_is_done() -> None:
    async def run() -> None:
        stream = OnPolicyStream(plan(2, 1), 0, 1, deadline_s=0.05)
        for step in range(2):
            task = await stream.next("a")
            assert task is not None and task.step == step
            await stream.put("a", task, ["x"])
            await stream.take(step, [0])
            if step == 0:
                with pytest.raises(InfrastructureError, match=r"a: no step was admitted .* learners, at version 0, "):
                    await stream.next("a")
                await stream.publish(1, "weights", 0)
        assert await stream.next("a") is None

    asyncio.run(run())
