"""RG-GRPO: the reasoner samples, the frozen pair judges, and what was better than its group becomes more likely.

  session ──▶ policy: n queries ──▶ frozen encoder: e(x,q) ──▶ frozen ranker: rewards ──▶ reward − group's mean
     ▲                                                                                          │
     └──────────────────────── one optimiser step of TRL's GRPOTrainer ◀────────────────────────┘

Group-relative policy optimisation (Shao et al., 2024), with the loss averaged over all tokens of a step, not query by
query (DAPO, Yu et al., 2025). Rewards are not divided by the group's deviation: where all queries rank alike, that
would blow up rounding errors. A query that must not be judged counts as worse than its group's others: left out, it
would be neither wanted nor unwanted, and nothing would keep the policy writing valid ones. A group without any teaches
nothing.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from rgalign_ray import config
from rgalign_ray.learner import engine, trl_trainer
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.learner.groups import OwnSource, Source, plan
from rgalign_ray.reasoner import models


def train(task: LearnerTask, host: Host, source: Source | None = None) -> dict[str, Any]:
    """Optimises the policy on the round's sessions and exports the reasoner.

    An epoch's last batch is filled up with sessions of its beginning.

    Args:
        task: weights, frozen pair and settings; `task.optimisation` is `config.Grpo`.
        host: hears of each optimiser step, and keeps the state.
        source: of judged groups; None samples and judges here.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss`, `reward` (mean of the valid queries),
        `valid_rate`, `clipped` (share of tokens whose ratio to the sampler's probability counted no further) and,
        where it has a weight, `kl` (divergence from the start, nats per token).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Grpo)
    with trl_trainer.at_hand(task) as task:
        return _train(task, settings, host, source)


def _train(task: LearnerTask, settings: config.Grpo, host: Host, source: Source | None) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns of every use of `rollout_func`,
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)  # and prints queries that are not judged
    steps = plan(task)
    ids = {session for sessions in steps for session in sessions}
    rollouts = Rollouts(source or OwnSource(task, steps), settings.n)
    curves = {"loss": "loss", "reward": "valid_reward", "valid_rate": "valid_rate", "clipped": "clip_ratio/region_mean"}
    figures = trl_trainer.run(
        task,
        host,
        lambda arguments: _OfOurSampler(
            model=engine.trainable(task),
            reward_funcs=reward,
            args=GRPOConfig(
                **arguments | {"per_device_train_batch_size": task.learner.micro_batch * settings.n},
                shuffle_dataset=False,  # the plan has every epoch in an order of its own
                num_generations=settings.n,
                max_completion_length=task.rollout.max_new_tokens,
                temperature=settings.temperature,
                beta=settings.kl_weight,
                epsilon=settings.clip,
                scale_rewards="none",
                loss_type="dapo",
                disable_dropout=True,  # samplers have none, and ratios to their probabilities would be noise
            ),
            train_dataset=Dataset.from_dict({"prompt": keys(steps)}),
            processing_class=models.load_tokenizer(task.reasoner.model),
            rollout_func=rollouts,
        ),
        curves | ({"kl": "kl"} if settings.kl_weight else {}),
    )
    return {"sessions": len(ids), **figures}


class _OfOurSampler(trl_trainer.Scheduled, GRPOTrainer):
    """Takes the sampler's log-probabilities for the old policy's: left alone, TRL ignores them, and weights that moved
    since would train uncorrected.
    """

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return output | {"old_per_token_logps": output["sampling_per_token_logps"]}


def reward(judged: list[list[float]], log_metric: Any, **rest: Any) -> list[float]:
    """One number per rollout, from what the rollouts brought with them: reward, and reward as the group counts it."""
    own = torch.tensor([pair[0] for pair in judged], dtype=torch.float64)
    valid = own.isfinite()
    sums = torch.stack([own[valid].sum(), valid.sum(), torch.tensor(len(own))])
    dist.all_reduce(sums)  # TRL takes the mean of the learners' means, and has none where one learner has none
    total, found, of = sums.tolist()
    log_metric("valid_rate", found / of)
    log_metric("valid_reward", total / found if found else math.nan)
    return [pair[1] for pair in judged]


INVALID_BELOW = 0.1
"""How far below the worst valid query of its group an invalid one counts, in units of the reward: below it even where
the valid ones are equal, as they often are by NDCG."""


def below_worst(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [B, n] with less than the lowest of its row in place of each nan; a row of nothing else stays so."""
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    return torch.where(rewards.isnan() & lowest.isfinite(), lowest - INVALID_BELOW, rewards)


def keys(steps: list[list[str]]) -> list[str]:
    """What stands for a prompt in TRL: step and place of a session in the plan."""
    return [f"{step}/{place}" for step, sessions in enumerate(steps) for place in range(len(sessions))]


class Rollouts:
    """TRL's `rollout_func`: judged groups of a source."""

    def __init__(self, source: Source, n: int) -> None:
        self.source, self.n = source, n

    def __call__(self, prompts: list[str], of: GRPOTrainer) -> dict[str, list]:
        """Of keys, each n times in a row: prompt_ids, completion_ids, logprobs and judged, one per key."""
        asked = [tuple(map(int, key.split("/"))) for key in prompts[:: self.n]]
        [step] = {step for step, _ in asked}
        assert step == of.state.global_step, "a batch of TRL is a step of the plan"
        with unwrap_model_for_generation(of.model_wrapped, of.accelerator) as model:
            training = model.training
            model.eval()
            groups = self.source.take(model, step, [place for _, place in asked])
            model.train(training)
        rewards = torch.tensor([group.rewards for group in groups])
        return {
            "prompt_ids": [group.prompt_ids for group in groups for _ in group.rewards],
            "completion_ids": [ids for group in groups for ids in group.completion_ids],
            "logprobs": [values for group in groups for values in group.logprobs],
            "judged": torch.stack([rewards, below_worst(rewards)], dim=-1).flatten(0, 1).tolist(),
        }
