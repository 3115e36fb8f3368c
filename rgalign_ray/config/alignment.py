"""What is chosen among the queries, and how the LLM learns from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rgalign_ray.config.base import Count, Fraction, Positive, Settings, Trained


class Select(Settings):
    method: Literal["best", "soft", "random", "title"] = "best"
    """title: no query at all but the clicked intent's own title, the control that needs no ranker."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """How far a session's best reward must stand above its mean, for any of its queries to teach."""
    beta: Positive = 0.1
    """soft: temperature of the resampling weights exp((r − max)/β)."""
    n: Count | None = None
    """Of how many of a session's queries, the first ones, is chosen; None: of all."""
    require_uplift: bool = False
    """Drop sessions in which no query beats the null query."""
    weight: Literal["even", "uplift"] = "even"
    """uplift: sessions are drawn again, each as often as its chosen query's reward above the null query's says."""
    rejected: Literal["worst", "random", "nearest"] = "worst"
    """Which query RG-DPO sets against the best: the one with the lowest reward, any, or the highest, of those that
    stand at least `pair_gap` below it."""
    pair_gap: Annotated[float, Field(ge=0.0)] = 0.0


class Optimisation(Settings):
    lr: Positive = 1e-4
    """Highest learning rate: it rises over the warm-up, and falls as a cosine."""
    epochs: Count = 1
    batch_sessions: Count = 16
    """Sessions of one optimiser step, over all workers."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps."""
    max_grad_norm: Positive = 1.0


class Sft(Optimisation):
    lr: Positive = 1e-3
    """Highest learning rate, as in SmolLM2's own tuning; models of billions of parameters want a tenth of it."""
    neftune_alpha: Annotated[float, Field(ge=0.0)] = 5.0
    """Noise on the token embeddings while learning (NEFTune); 0: none."""


class Dpo(Optimisation):
    lr: Positive = 5e-5
    beta: Positive = 0.1
    """Weight of the divergence from the reference."""


class Grpo(Optimisation):
    """Samples as long as `rollout.max_new_tokens`, with top-p 1."""

    lr: Positive = 2e-5
    n: Annotated[int, Field(ge=2)] = 8
    """Queries of one group."""
    temperature: Positive = 0.7
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.02
    """Weight of the divergence from the reasoner that the objective starts from."""
    clip: Positive = 0.2
    """How far the ratio to the sampler's probability counts, either way."""
    sampler: Literal["learner", "pool"] = "learner"
    """learner: learners sample and judge by themselves, with the policy as it is. pool: `rollout.workers` samplers and
    a judge do, in processes of their own."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """Of the pool: by how many optimiser steps the weights that sample lag those that learn. 0: learning waits for
    sampling. 1: a step is sampled while the one before is learned from."""

    @model_validator(mode="after")
    def _stale(self) -> Grpo:
        if self.staleness and self.sampler == "learner":
            raise ValueError("staleness needs sampler: pool; learners sample with the policy as it is")
        return self


class Embedding(Optimisation):
    """Objectives that move the embedding through the frozen ranker."""

    lr: Positive = 2e-4
    readouts: Annotated[list[Literal["prompt", "query"]], Field(min_length=1)] = ["prompt", "query"]
    """Which embeddings learn; a session without a selected query has e(x) alone."""
    text_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of RG-SFT's loss on the selected query, in nats a token, beside the objective's and in the same pass: a
    reasoner whose embedding alone is asked for forgets how to write."""


class Contrastive(Embedding):
    """RG-CL."""


class Gradient(Embedding):
    """The ranking loss through the frozen ranker. Rate and steps are those of a model of 135 million parameters and
    some thousand sessions with a click (docs/alignment-study.md); larger models want a lower rate."""

    lr: Positive = 1e-3
    epochs: Count = 3
    text_weight: Annotated[float, Field(ge=0.0)] = 0.1
    through: Literal["all", "match"] = "all"
    """What of the ranker the loss goes back through: all, or the match of texts alone. The query tower has learned from
    the log what is shown, and moves all sessions alike towards that; the match says which intents a text is near."""


class Latent(Embedding):
    """Reinforcement learning on noisy copies of the embedding."""

    copies: Annotated[int, Field(ge=2)] = 8
    noise: Positive = 0.3
    """Standard deviation of a copy, in deviations between sessions of each direction that the ranker reads."""


AlignName = Literal["sft", "dpo", "grpo", "contrastive", "gradient", "latent"]


class Learner(Trained):
    """DeepSpeed engines in Ray Train workers, for every objective."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shares out among learners: optimiser states (1), gradients as well (2), weights as well (3)."""
    bf16: bool | Literal["auto"] = "auto"
    """auto: where `reasoner.dtype` comes out as bfloat16. Master weights and optimiser are float32 either way;
    gradients are summed in bfloat16 then."""
    micro_batch: Count = 4
    """Sessions of one forward pass on one worker."""
