"""RG-GRPO: the reasoner samples, the frozen pair judges, and what was better than its group becomes more likely.

  session ──▶ policy: n queries ──▶ frozen encoder: e(x,q) ──▶ frozen ranker: rewards ──▶ reward − group's mean
     ▲                                                                                          │
     └──────────────────────── one optimiser step of TRL's GRPOTrainer ◀────────────────────────┘

Group-relative policy optimisation (Shao et al., 2024). Rewards are not divided by the group's deviation: where
all queries rank alike, that would blow up rounding errors. A query that must not be judged counts as the worst of
its group's others: left out, it would be neither wanted nor unwanted, and nothing would keep the policy writing
valid ones. A group without any teaches nothing.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from rgalign_ray import config
from rgalign_ray.learner import engine, trainer
from rgalign_ray.learner.engine import Advance, LearnerTask
from rgalign_ray.learner.frozen import FrozenRanker
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Group, Prompts, sample_seed
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.reward.functions import fault


def train(task: LearnerTask, advance: Advance) -> dict[str, Any]:
    """Optimises the policy on the round's sessions and exports the reasoner.

    An epoch's last batch is filled up with sessions of its beginning.

    Args:
        task: weights, frozen pair and settings; `task.optimisation` is `config.Grpo`.
        advance: called after each optimiser step.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss`, `reward` (mean of the valid queries),
        `valid_rate`, `clipped` (share of tokens whose ratio to the sampler's probability counted no further) and,
        where it has a weight, `kl` (divergence from the start, nats per token).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Grpo)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns of every use of `rollout_func`,
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)  # and prints queries that are not judged
    rollouts = Rollouts(task)
    ids = rollouts.session_ids
    filled = [ids[i % len(ids)] for i in range(len(ids) + -len(ids) % settings.batch_sessions)]
    curves = {"loss": "loss", "reward": "valid_reward", "valid_rate": "valid_rate", "clipped": "clip_ratio/region_mean"}
    figures = trainer.run(
        task,
        advance,
        lambda arguments: _OfOurSampler(
            model=engine.trainable(task),
            reward_funcs=reward,
            args=GRPOConfig(
                **arguments | {"per_device_train_batch_size": task.learner.micro_batch * settings.n},
                num_generations=settings.n,
                max_completion_length=task.rollout.max_new_tokens,
                temperature=settings.temperature,
                beta=settings.kl_weight,
                epsilon=settings.clip,
                scale_rewards="none",
            ),
            train_dataset=Dataset.from_dict({"prompt": filled}),
            processing_class=models.load_tokenizer(task.reasoner.model),
            rollout_func=rollouts,
        ),
        curves | ({"kl": "kl"} if settings.kl_weight else {}),
    )
    return {"sessions": len(ids), **figures}


class _OfOurSampler(GRPOTrainer):
    """Takes the sampler's log-probabilities for the old policy's: left alone, TRL ignores them, and weights that moved
    since would train uncorrected.
    """

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return output | {"old_per_token_logps": output["sampling_per_token_logps"]}


def reward(judged: list[list[float]], log_metric: Any, **rest: Any) -> list[float]:
    """One number per rollout, from what the rollouts brought with them: reward, and reward as the group counts it."""
    own = np.array([pair[0] for pair in judged])
    log_metric("valid_rate", float(np.isfinite(own).mean()))
    log_metric("valid_reward", float(np.nanmean(own)) if np.isfinite(own).any() else float("nan"))
    return [pair[1] for pair in judged]


def at_worst(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [B, n] with the lowest of its row in place of each nan; a row of nothing else stays so."""
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    return torch.where(rewards.isnan() & lowest.isfinite(), lowest, rewards)


class Rollouts:
    """Samples with the policy as it is now, and judges by the frozen pair; TRL's `rollout_func`."""

    def __init__(self, task: LearnerTask) -> None:
        assert isinstance(task.optimisation, config.Grpo) and task.pair is not None
        self.task, self.settings = task, task.optimisation
        self.encoder = TransformersEngine(task.reasoner, task.prompt.max_session_tokens, task.pair.encoder)
        self.policy = copy.copy(self.encoder)  # of the same tokenizer and settings; its weights are the trainer's
        self.ranker = FrozenRanker(task)
        self.session_ids: list[str] = self.ranker.table["session_id"].to_pylist()
        template = Template.load(task.prompt.template)
        self.prefix, self.suffix = template.prefix, template.suffix
        self.texts = template.sessions(self.ranker.table)
        self.place = {session: row for row, session in enumerate(self.session_ids)}

    def __call__(self, prompts: list[str], of: GRPOTrainer) -> dict[str, list]:
        """Of session ids, each n times in a row: prompt_ids, completion_ids, logprobs and judged, one per id."""
        n = self.settings.n
        rows = [self.place[session] for session in prompts[::n]]
        with unwrap_model_for_generation(of.model_wrapped, of.accelerator) as model:
            training = model.training
            model.eval()
            groups = self.sample(model, rows, of.state.global_step)
            model.train(training)
        rewards = self.judge(rows, groups)
        samples = [sample for group in groups for sample in group.samples]
        return {
            "prompt_ids": [group.prompt_ids for group in groups for _ in group.samples],
            "completion_ids": [sample.completion_ids for sample in samples],
            "logprobs": [sample.logprobs for sample in samples],
            "judged": torch.stack([rewards, at_worst(rewards)], dim=-1).flatten(0, 1).tolist(),
        }

    def sample(self, model: Any, rows: list[int], step: int) -> list[Group]:
        """n samples of each session, seeded by session and step."""
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.policy.use(causal, self.task.version)
        seen: Counter[int] = Counter()
        seeds = []
        for row in rows:  # a filled-up batch may hold a session twice
            first = seen[row] * self.settings.n
            numbers = range(first, first + self.settings.n)
            seeds.append([sample_seed(self.task.seed, step, self.session_ids[row], number) for number in numbers])
            seen[row] += 1
        return self.policy.sample(
            self.prompts(rows),
            seeds,
            temperature=self.settings.temperature,
            top_p=1.0,  # the trainer's probabilities know no nucleus
            max_new_tokens=self.task.rollout.max_new_tokens,
        )

    def judge(self, rows: list[int], groups: list[Group]) -> torch.Tensor:
        """float32 [B, n]; nan for queries that must not be judged."""
        n = self.settings.n
        completions = [sample.completion_ids for group in groups for sample in group.samples]
        vectors = self.encoder.embed(self.prompts([row for row in rows for _ in range(n)]), completions)
        embeddings = torch.from_numpy(vectors.astype(np.float32)).view(len(rows), n, -1)
        invalid = torch.tensor([[fault(sample) is not None for sample in group.samples] for group in groups])
        z = self.ranker.model.queries(embeddings.to(self.task.device), invalid.to(self.task.device))
        return self.ranker.rewards(z, rows).cpu().masked_fill(invalid, torch.nan)

    def prompts(self, rows: list[int]) -> Prompts:
        return Prompts(self.prefix, [self.texts[row] for row in rows], self.suffix)
