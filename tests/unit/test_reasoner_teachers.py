"""A teacher that is run here: its own model, sampled as it asks to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.reasoner.engine import EngineSpec, Group, Prompts, Proposal, Sample
from rgalign_ray.reasoner.teachers import TeacherSpec

SHARED = config.Rollout(temperature=0.8, top_p=0.9, max_new_tokens=7)


class Engine:
    def __init__(self) -> None:
        self.asked: config.Sampling | None = None

    def sample(self, prompts: Prompts, seeds: list[list[int]], sampling: config.Sampling) -> list[Group]:
        self.asked = sampling
        vector = np.zeros(2, np.float16)
        return [Group([1], vector, [Sample(text, [2], [0.0], "stop", 0, vector)]) for text in prompts.texts]


@pytest.mark.parametrize(
    ("teacher", "model", "engine", "sampling"),
    [
        ({}, "tiny", "transformers", {"temperature": 0.8, "top_p": 0.9}),
        ({"model": "large", "engine": "vllm"}, "large", "vllm", {"temperature": 0.8, "top_p": 0.9}),
        ({"temperature": 1.5, "top_p": 0.5}, "tiny", "transformers", {"temperature": 1.5, "top_p": 0.5}),
    ],
)
def test_it_is_the_model_that_it_names_and_is_sampled_by_its_own_settings(
    monkeypatch: pytest.MonkeyPatch, teacher: dict[str, Any], model: str, engine: str, sampling: dict[str, float]
) -> None:
    started: list[EngineSpec] = []
    fake = Engine()
    monkeypatch.setattr(EngineSpec, "start", lambda self: started.append(self) or fake)
    settings = config.Teacher.model_validate({"name": "other"} | teacher)
    spec = TeacherSpec(settings, config.Reasoner(model="tiny"), SHARED, 64, "")
    found = spec.start().propose(Prompts("", ["where is it?", "refund"], ""), [[0], [1]])
    (of,) = started
    assert (of.reasoner.model, of.reasoner.engine, of.max_session_tokens) == (model, engine, 64)
    assert of.weights is None and of.reasoner.lora is None, "the base model, never what was aligned"
    assert fake.asked == config.Sampling(**sampling, max_new_tokens=7)
    assert found == [[Proposal("where is it?", "stop")], [Proposal("refund", "stop")]]
