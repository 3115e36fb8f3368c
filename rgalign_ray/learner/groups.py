"""Groups of RG-GRPO: who samples them, who judges them, and what of them a learner needs.

Plain classes without TRL, so that samplers and judges start without it, in whatever process they stand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import torch

from rgalign_ray import config, storage
from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import LearnerTask
from rgalign_ray.learner.frozen import FrozenRankers
from rgalign_ray.reasoner.engine import Engine, EngineSpec, Group, Prompts, sample_seed
from rgalign_ray.reward.functions import fault

if TYPE_CHECKING:  # likewise in training.py
    from transformers import PreTrainedModel

    from rgalign_ray.reasoner.transformers_engine import TransformersEngine

HALF = "half"
"""In the place of a name: weights that did not come whole."""


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """n queries of one session, and what each is worth."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    """Of each token, under the weights that sampled it."""
    rewards: list[float]
    """nan for a query that must not be judged."""


class Source(Protocol):
    """Where a learner's groups come from."""

    def take(self, model: PreTrainedModel, step: int, places: Sequence[int]) -> list[JudgedGroup]:
        """Groups of some of a step's sessions, by their places in the plan.

        Every rank asks at every step, in the order of steps; `model` is the policy as it is now, with whole weights
        and its adapter apart.
        """
        ...


def plan(task: LearnerTask) -> list[list[str]]:
    """Ids of the round's sessions, as `engine.in_steps`."""
    assert task.pair is not None
    ids = sorted(storage.read_table(task.pair.sessions, columns=["session_id"])["session_id"].to_pylist())
    return engine.in_steps(ids, task.optimisation, task.seed)


def seeds(session_ids: Sequence[str], step: int, places: Sequence[int], n: int, seed: int) -> list[list[int]]:
    """Of n samples at some places of a step, whose sessions are all of `session_ids`: one that comes again is sampled
    anew.
    """
    found = []
    for place in places:
        first = session_ids[:place].count(session_ids[place]) * n
        found.append([sample_seed(seed, step, session_ids[place], number) for number in range(first, first + n)])
    return found


class Sessions:
    """The round's sessions as prompts."""

    def __init__(self, task: LearnerTask, table: pa.Table) -> None:
        self.prefix, self.suffix = task.template.prefix, task.template.suffix
        ids: list[str] = table["session_id"].to_pylist()
        self.row = {session: row for row, session in enumerate(ids)}
        self.text = dict(zip(ids, task.template.sessions(table), strict=True))

    def prompts(self, session_ids: Sequence[str]) -> Prompts:
        return Prompts(self.prefix, [self.text[session] for session in session_ids], self.suffix)


class Judge:
    """The frozen pair: reads queries, and tells their rewards.

    Args:
        task: the objective's work.
        on_gpu: where the ranker computes; None: where the learners do, of whom this is then a part.

    Raises:
        DataError: where a ranker was trained on another reasoner than the pair's.
    """

    def __init__(self, task: LearnerTask, on_gpu: bool | None = None) -> None:
        from rgalign_ray.reasoner.transformers_engine import TransformersEngine

        pair = task.pair
        assert pair is not None
        if on_gpu is not None:
            task = replace(task, learner=task.learner.model_copy(update={"use_gpu": on_gpu}))
        self.task = task
        self.encoder = TransformersEngine(task.reasoner, task.prompt.max_session_tokens, pair.encoder)
        self.rankers = FrozenRankers(task, self.encoder.version)
        self.sessions = Sessions(task, self.rankers.table)

    def judge(self, session_ids: Sequence[str], groups: Sequence[Group]) -> list[JudgedGroup]:
        """The groups of sessions, judged."""
        n = len(groups[0].samples)
        completions = [sample.completion_ids for group in groups for sample in group.samples]
        vectors = self.encoder.embed(self.sessions.prompts([i for i in session_ids for _ in range(n)]), completions)
        embeddings = torch.from_numpy(vectors.astype(np.float32)).view(len(groups), n, -1)
        invalid = torch.tensor([[fault(sample) is not None for sample in group.samples] for group in groups])
        invalid |= ~embeddings.isfinite().all(dim=-1)
        told, is_null = embeddings.to(self.task.device), invalid.to(self.task.device)
        rows = [self.sessions.row[i] for i in session_ids]
        rewards = self.rankers.rewards(lambda ranker: ranker.queries(told, is_null), rows).cpu()
        rewards = rewards.masked_fill(invalid, torch.nan)
        return [
            JudgedGroup(
                group.prompt_ids,
                [sample.completion_ids for sample in group.samples],
                [sample.logprobs for sample in group.samples],
                row.tolist(),
            )
            for group, row in zip(groups, rewards, strict=True)
        ]


class Sampler:
    """Samples groups, with weights that change from step to step.

    Args:
        task: the objective's work.
        steps: the plan.
        policy: what samples; by default an engine of its own, as the reasoner's settings name it, with the weights that
            the objective starts from.
    """

    def __init__(
        self, task: LearnerTask, steps: Sequence[Sequence[str]], policy: TransformersEngine | None = None
    ) -> None:
        assert isinstance(task.optimisation, config.Grpo) and task.pair is not None
        self.task, self.settings, self.steps = task, task.optimisation, steps
        self.engine: Engine = policy or EngineSpec(task.reasoner, task.prompt.max_session_tokens, task.weights).start()
        self.sessions = Sessions(task, storage.read_table(task.pair.sessions).sort_by("session_id"))
        self._weights = task.weights

    def take(self, weights: str | None) -> None:
        """Goes on with the weights of an artefact; None: those that the objective starts from."""
        wanted = weights or self.task.weights
        if wanted != self._weights:
            self._weights = HALF
            self.engine.load(wanted)
            self._weights = wanted

    def sample(self, step: int, places: Sequence[int]) -> list[Group]:
        """Groups of the sessions at some places of a step."""
        return self.engine.sample(
            self.sessions.prompts([self.steps[step][place] for place in places]),
            seeds(self.steps[step], step, places, self.settings.n, self.task.seed),
            config.Sampling(
                max_new_tokens=self.task.rollout.max_new_tokens,
                temperature=self.settings.temperature,
                top_p=1.0,  # the trainer's probabilities know no nucleus
            ),
        )


class OwnSource:
    """Samples and judges in the learner's own process, with the policy as it is now."""

    def __init__(self, task: LearnerTask, steps: Sequence[Sequence[str]]) -> None:
        self.task, self.steps = task, steps
        self.judge = Judge(task)
        # of the same tokenizer and settings; its weights are the trainer's, and lie where it learns
        self.policy = copy.copy(self.judge.encoder)
        self.policy.device = task.device
        self.sampler = Sampler(task, steps, self.policy)

    def take(self, model: PreTrainedModel, step: int, places: Sequence[int]) -> list[JudgedGroup]:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.policy.use(causal, self.task.version)
        judged, size = [], self.task.rollout.unit_sessions  # TRL asks for the groups of a whole step at once
        for part in (places[start : start + size] for start in range(0, len(places), size)):
            ids = [self.steps[step][place] for place in part]
            judged += self.judge.judge(ids, self.sampler.sample(step, part))
        return judged
