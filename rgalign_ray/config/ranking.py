"""QE-Rec and its rivals, and the reward that a frozen one gives."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rgalign_ray.config.base import Count, Fraction, Placed, Positive, Settings, Trained


class QueryInput(Settings):
    """Probabilities with which a training session's query tower reads the null vector, e(x) or e(x,q)."""

    no_query: Fraction = 0.2
    prompt: Fraction = 0.5
    query: Fraction = 0.3

    @model_validator(mode="after")
    def _sum(self) -> QueryInput:
        if not math.isclose(self.no_query + self.prompt + self.query, 1.0, abs_tol=1e-6):
            raise ValueError("probabilities must add up to 1")
        return self


Baseline = Literal["two_tower", "sasrec", "din", "din_text", "bst", "deepfm", "dcn_v2", "lr", "popularity"]
Model = Literal["qe_rec", "din_sentence", "cosine", Baseline]
"""Every kind of ranker; those that are no baseline read embeddings of the sessions' texts."""
RankBy = Literal["click", "log"]
"""What scores are for: which intent is clicked if it is shown, or which is shown and clicked, as the log has it."""


class Ranker(Trained):
    dim: Count = 32
    """Width of the towers' vectors."""
    heads: Count = 4
    """Of attention."""
    autoint_layers: Count = 2
    """Layers of attention between a tower's features."""
    experts: Count = 4
    """Of a tower's mixture of experts."""
    attention_layers: Count = 1
    """Layers of mutual attention between user, item and query."""
    dropout: Fraction = 0.1
    whitened_dim: Count = 64
    """Principal directions of the embedding that the query tower reads."""
    text_match: bool = True
    """Whether rankers that read a session's embedding add to each score how near the intent's text is to it, where one
    encoder has read both."""
    gate_lr_scale: Positive = 10.0
    """Learning rate of the gates, relative to the rest: they start at zero and must be able to open."""
    tau: Positive = 1.0
    """Temperature of ⟨z, v_i⟩ in the KL term and in RG-CL."""
    kl: Literal["fused", "user", "off"] = "fused"
    """Whose ranking the query tower's alone must be near: the whole ranker's (fused), the user tower's, or nobody's."""
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Of that divergence, beside the ranking loss."""
    no_click_weight: Annotated[float, Field(ge=0.0)] = 0.2
    """Weight of the pointwise term on sessions without a click."""
    query_input: QueryInput = QueryInput()
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-3
    batch_sessions: Count = 128
    """Sessions of one optimiser step, over all workers."""
    epochs: Count = 20
    average: Annotated[float, Field(ge=0.0)] | None = 3.0
    """The ranker is the average of the weights after each step, the t-th of T by about (t / T) to this power: what
    validation judges and what is kept. 0 averages all steps alike, null takes the last. (Polynomial-decay averaging,
    Shamir & Zhang 2013, arXiv:1212.1824.)"""
    patience: Count = 4
    """Epochs without a better validation GAUC before training stops."""

    def changed(self, changes: dict[str, Any]) -> Ranker:
        """These settings with some of them replaced, and checked."""
        return Ranker.model_validate(self.model_dump() | changes)


class Retrain(Settings):
    """How the rankers of a round after the first begin."""

    start: Literal["anew", "previous"] = "previous"
    """anew: with initial weights of their own. previous: with the weights of the round before (a warm start), which
    stay unless validation prefers by `margin` what was learned since; what they read is centred anew."""
    lr_scale: Positive = 0.3
    """Learning rate of a warm start, relative to `ranker.lr`."""
    margin: Annotated[float, Field(ge=0.0)] = 2.0
    """Standard errors of its GAUC over the same validation sessions by which a warm start must have become better."""


class Reward(Placed):
    kind: Literal["logprob", "ndcg"] = "logprob"
    """logprob: the mean log-probability of the clicked intents. ndcg: NDCG@k of the ranking."""
    k: Count = 3
    """Cut-off of the ndcg reward."""
    resolved_weight: Fraction = 0.0
    """Share of the reward that asks for the clicks that resolved the need instead of all clicks; above 0 it needs a log
    with the column `resolved`. RG-CL and SFT on the clicked title, which no reward decides, learn from all clicks."""
    rank_by: RankBy = "click"
    """What the frozen rankers' scores are for as they judge, and as objectives ask them. click: which is clicked, of
    those that were shown. log: which is shown and clicked, of all candidates; a reasoner then learns what was shown, as
    it does by RG-CL, which always asks so."""
    halves: bool = False
    """Where sessions have several clicks: the reward reads one half of a session's, drawn by hash, and the auditor the
    other, so that the auditor confirms what the clicks have in common and not those that chose the query."""
    judge_seeds: Annotated[int, Field(ge=2)] = 2
    """Rankers of different seeds that score every rollout. The last measures the noise of the reward, which is the mean
    of the others' (an ensemble, if there are several), and so is what objectives ask for as they learn."""
    workers: Count = 2
    """Reward models that judge units beside each other."""
    cpus: Positive = 0.5
    """CPUs of each."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "workers", "cpus")
