"""The vLLM engine for real. It needs an environment of its own: `make test-vllm`."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from rgalign_ray import config
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import EngineSpec, Group, Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

SETTINGS = config.Reasoner(engine="vllm", dtype="float32", device="cpu", threads=2, vllm=config.Vllm(cpu_cache_gib=1))
TEXTS = [
    'order shipped, delayed, 7 days; typed "where is my parcel"; did view tracking, contact courier',
    'order delivered, wrong size; typed "send it back"; did view order, view return policy',
    'no order; typed "does this come in blue"',
]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    template = Template.load("shop")
    return Prompts(template.prefix, TEXTS, template.suffix)


@pytest.fixture(scope="module")
def engine():
    return EngineSpec(SETTINGS, 160, None).start()


@pytest.fixture(scope="module")
def reader() -> TransformersEngine:
    return TransformersEngine(SETTINGS, 160)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reasoner artefact whose weights are not the base model's."""
    folder = tmp_path_factory.mktemp("other")
    model = models.load_base(SETTINGS)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.add_(0.5 * weight.std() * torch.randn_like(weight))
    model.save_pretrained(folder)
    models.describe(str(folder), base="smollm2", version="other", adapter=False)
    return str(folder)


def sample(engine, prompts: Prompts, seeds: list[list[int]], temperature: float = 0.8) -> list[Group]:
    return engine.sample(prompts, seeds, config.Sampling(temperature=temperature, top_p=1.0, max_new_tokens=12))


def seeds(first: int, n: int = 3) -> list[list[int]]:
    return [[first + 100 * row + place for place in range(n)] for row in range(len(TEXTS))]


def written(groups: list[Group]) -> list[list[str]]:
    return [[sample.query for sample in group.samples] for group in groups]


def test_equal_seeds_write_equal_queries_and_others_do_not(engine, prompts: Prompts) -> None:
    first, again, others = (sample(engine, prompts, seeds(at)) for at in (1, 1, 7_000))
    assert written(first) == written(again) != written(others)
    assert all(len(set(queries)) > 1 for queries in written(first)), "samples of one prompt differ"
    for group, ids in zip(first, engine.prompt_ids(prompts), strict=True):
        assert group.prompt_ids == ids
        for one in group.samples:
            assert len(one.logprobs) == len(one.completion_ids) <= 12
            assert (one.completion_ids[-1] in engine.stop_ids) == (one.finish == "stop")


def test_more_prompts_than_one_step_takes_are_sampled_by_their_seeds(engine, prompts: Prompts) -> None:
    texts = [f"order {number}; " + TEXTS[0] * 6 for number in range(40)]
    many = Prompts(prompts.prefix, texts, prompts.suffix)
    groups = sample(engine, many, [[number, number + 1] for number in range(40)])
    assert sum(len(group.prompt_ids) for group in groups) > 4096, "vLLM's own bound for a CPU"
    assert all(len(group.samples) == 2 for group in groups)


def test_what_it_samples_is_read_as_transformers_reads_it(engine, reader: TransformersEngine, prompts: Prompts) -> None:
    groups = sample(engine, prompts, seeds(1))
    np.testing.assert_allclose(np.stack([group.embedding for group in groups]), reader.embed(prompts), atol=2e-2)
    completions = [group.samples[1].completion_ids for group in groups]
    read = reader.embed(prompts, completions)
    np.testing.assert_allclose(np.stack([group.samples[1].embedding for group in groups]), read, atol=2e-2)


def test_log_probabilities_are_those_of_the_distribution(engine, prompts: Prompts) -> None:
    groups = sample(engine, prompts, seeds(1), temperature=0.8)
    reader = TransformersEngine(SETTINGS.model_copy(update={"pooling": "last", "depth": 1.0}), 160)
    hidden = torch.from_numpy(reader.embed(prompts).astype(np.float32))
    expected = torch.log_softmax(reader.model.lm_head(hidden).float() / 0.8, dim=-1)
    for row, group in enumerate(groups):
        for one in group.samples:
            assert one.logprobs[0] == pytest.approx(float(expected[row, one.completion_ids[0]]), abs=0.05)


def test_new_weights_are_taken_without_a_restart(
    engine, reader: TransformersEngine, prompts: Prompts, other: str
) -> None:
    def greedy(of) -> list[list[str]]:
        return written(sample(of, prompts, seeds(1, 2), temperature=1e-4))

    base, process = greedy(engine), engine._llm
    assert base == greedy(reader)
    engine.load(other)
    assert engine.version == "other" and engine._llm is process
    changed = greedy(engine)
    reader.load(other)
    assert changed == greedy(reader) != base
    engine.load(None)
    assert greedy(engine) == base, "nothing of the other weights is left in a cache"


def test_a_sampler_of_rg_grpo_follows_the_weights_that_learn(
    engine, prompts: Prompts, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rgalign_ray import schema, storage
    from rgalign_ray.learner.engine import FrozenPair, LearnerTask
    from rgalign_ray.learner.groups import Sampler

    monkeypatch.setattr(EngineSpec, "start", lambda _: engine)
    ts, history = pa.array([None] * 3, schema.TIMESTAMP), pa.array([[]] * 3, pa.list_(schema.EVENT))
    table = pa.table({"session_id": ["a", "b", "c"], "words": TEXTS, "ts": ts, "history": history})
    storage.write_table(str(tmp_path / "sessions.parquet"), table)
    template = Template(version="v", prefix=prompts.prefix, session="{{ words }}", suffix=prompts.suffix, item="")
    pair = FrozenPair(("",), None, str(tmp_path / "sessions.parquet"), "", config.Reward())
    work = LearnerTask(
        objective="grpo",
        reasoner=SETTINGS,
        learner=config.Learner(),
        optimisation=config.Grpo(n=2, temperature=0.8),
        weights=None,
        data="",
        out="",
        version="v",
        seed=0,
        pair=pair,
        prompt=config.Prompt(),
        template=template,
        rollout=config.Rollout(max_new_tokens=12),
    )
    sampler = Sampler(work, [["a", "b", "c"]])
    first = sampler.sample(0, [0, 2])
    assert [len(group.samples) for group in first] == [2, 2]
    sampler.take(other)
    assert engine.version == "other" and written(sampler.sample(0, [0, 2])) != written(first)
    sampler.take(None)
    assert written(sampler.sample(0, [0, 2])) == written(first)


def test_the_samplers_actor_starts_without_what_learners_need() -> None:
    """Its class is found by the name of its module."""
    assert importlib.import_module("rgalign_ray.loop.on_policy").SamplerActor


def test_a_worker_writes_what_it_samples(
    engine, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rgalign_ray import storage
    from rgalign_ray.rollout.worker import Instruction, RolloutWorker, Unit

    monkeypatch.setattr(EngineSpec, "start", lambda _: engine)
    spec = EngineSpec(SETTINGS, 160, None)
    settings = config.Rollout(n=2, max_new_tokens=12)
    worker = RolloutWorker(spec, Instruction(prompts.prefix, prompts.suffix, "v"), settings, 0, 1, str(tmp_path))
    assert worker.run(Unit(["a", "b", "c"], TEXTS), "unit") > 0
    table = storage.read_table(str(tmp_path / "rollouts/unit.parquet"))
    assert table["session_id"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    vectors = storage.read_table(str(tmp_path / "embeddings/unit.parquet"))
    assert len(vectors) == 3 + 6
