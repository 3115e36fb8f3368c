"""What every engine does: sample latent queries, embed prompts, take new weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rgalign_ray import config


@dataclass(frozen=True, slots=True)
class Prompts:
    """Session texts behind one instruction that all of them share, so that it is computed once."""

    prefix: str
    texts: Sequence[str]
    suffix: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled latent query."""

    query: str
    completion_ids: list[int]
    """Tokens of the query and, where one was sampled, the stop token."""
    logprobs: list[float]
    """Log-probability of each completion token under the policy at the sampling temperature (top-p aside)."""
    finish: str
    """`stop` or `length`."""
    seed: int
    embedding: np.ndarray
    """e(x,q), float16 [H], as `reading` has it."""


@dataclass(frozen=True, slots=True)
class Group:
    """What one prompt gave: e(x) and its samples, read in one prefill."""

    prompt_ids: list[int]
    embedding: np.ndarray
    """e(x), float16 [H], as `reading` has it."""
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A query that a teacher wrote."""

    query: str
    finish: str
    """`stop` or `length`."""


class Engine(Protocol):
    """An LLM behind one interface, whatever runs it."""

    version: str
    """Version of the weights in use; every embedding carries it."""
    hidden_size: int

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        """One group per prompt, with one sample per seed; equal seeds and logits give equal samples."""
        ...

    def embed(self, prompts: Prompts, completions: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """e(x), or e(x,q) where completions are given: float16 [len(prompts.texts), H]."""
        ...

    def read(self, prompts: Prompts, queries: Sequence[str]) -> list[Sample]:
        """Queries that others wrote, one a prompt, as this engine would have written and reads them."""
        ...

    def load(self, weights: str | None) -> None:
        """Takes the weights of a reasoner artefact (a URI); None returns to the base model."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that a process needs to start an engine; plain data, so that a restart is a start."""

    reasoner: config.Reasoner
    max_session_tokens: int
    weights: str | None

    def start(self) -> Engine:
        if self.reasoner.engine == "sentence":
            from rgalign_ray.reasoner.sentence_encoder import SentenceEncoder

            return SentenceEncoder(self.reasoner, self.max_session_tokens)
        if self.reasoner.engine == "vllm":
            from rgalign_ray.reasoner.vllm_engine import VllmEngine

            return VllmEngine(self.reasoner, self.max_session_tokens, self.weights)
        from rgalign_ray.reasoner.transformers_engine import TransformersEngine

        return TransformersEngine(self.reasoner, self.max_session_tokens, self.weights)


def written(tokenizer: Any, query: str, suffix: str) -> list[int]:
    """Tokens of a query that somebody else wrote, as the completion of a prompt that ends in `suffix`."""
    space = "" if suffix[-1:].isspace() else " "
    return tokenizer(f"{space}{query}\n", add_special_tokens=False)["input_ids"]


def sample_seed(run_seed: int, round_: int, session_id: str, sample: int) -> int:
    """The seed of one sample: a 63-bit hash, so that it depends on no order and no batch."""
    text = f"{run_seed}\x1f{round_}\x1f{session_id}\x1f{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
