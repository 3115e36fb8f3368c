"""Teachers: LLMs that propose queries beside the policy, each under its own prompt and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rgalign_ray import config
from rgalign_ray.reasoner.engine import EngineSpec, Prompts, Proposal


class Proposer(Protocol):
    def propose(self, prompts: Prompts, seeds: Sequence[Sequence[int]]) -> list[list[Proposal | None]]:
        """A proposal per prompt and seed; None where it is asked no more."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """All that a process needs to start a teacher; plain data."""

    teacher: config.Teacher
    reasoner: config.Reasoner
    """How models are run here; the teacher's own model stands in `teacher`."""
    sampling: config.Sampling
    max_session_tokens: int
    cache_uri: str
    """Keeps answers of endpoints."""

    def start(self) -> Proposer:
        if self.teacher.engine == "openai":
            from rgalign_ray.reasoner.openai_engine import OpenAIEngine

            return OpenAIEngine(self.teacher, self.sampling, self.cache_uri)
        return LocalTeacher(self)


class LocalTeacher:
    """A teacher that is run here."""

    def __init__(self, spec: TeacherSpec) -> None:
        model = spec.teacher.model or spec.reasoner.model
        as_usual = {"lora": None, "pooling": "last", "depth": 1.0}  # nothing is learned of it, nor read
        settings = spec.reasoner.model_copy(update={"model": model, "engine": spec.teacher.engine, **as_usual})
        self.engine = EngineSpec(settings, spec.max_session_tokens, None).start()
        self.sampling = sampling(spec.teacher, spec.sampling)

    def propose(self, prompts: Prompts, seeds: Sequence[Sequence[int]]) -> list[list[Proposal | None]]:
        groups = self.engine.sample(prompts, seeds, self.sampling)
        return [[Proposal(sample.query, sample.finish) for sample in group.samples] for group in groups]


def sampling(teacher: config.Teacher, shared: config.Sampling) -> config.Sampling:
    """How a teacher's queries are drawn: as it asks, or as all are."""
    return config.Sampling(
        max_new_tokens=shared.max_new_tokens,
        temperature=teacher.temperature or shared.temperature,
        top_p=teacher.top_p or shared.top_p,
    )
