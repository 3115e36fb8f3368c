"""Rollout workers with vLLM on a Ray cluster, whose interpreter the pool is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import ray

from rgalign_ray import config, storage
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner.engine import EngineSpec
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, Unit

TEXTS = ['order shipped, delayed, 7 days; typed "where is my parcel"', 'no order; typed "does this come in blue"']


def test_workers_of_another_interpreter_sample_and_read(tmp_path: Path) -> None:
    template = Template.load("shop")
    settings = config.Rollout(n=2, workers=1, max_new_tokens=8, deadline_s=300)
    reasoner = config.Reasoner(engine="vllm", dtype="float32", device="cpu", vllm=config.Vllm(cpu_cache_gib=1))
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        pool = RolloutPool(
            settings,
            {
                "engine": EngineSpec(reasoner, 160, None),
                "instruction": Instruction(template.prefix, template.suffix, template.version),
                "settings": settings,
                "run_seed": 1,
                "round_": 1,
                "out_uri": str(tmp_path),
            },
            python=sys.executable,
        )
        [(key, sessions)] = pool.run([Unit(["a", "b"], TEXTS)], "test")
        pool.close()
    finally:
        ray.shutdown()
    rollouts = storage.read_table(str(tmp_path / f"rollouts/{key}.parquet"))
    assert sessions == 2 and rollouts["session_id"].to_pylist() == ["a", "a", "b", "b"]
    assert all(rollouts["completion_ids"].to_pylist()) and rollouts["reasoner_version"][0].as_py() == "smollm2"
    vectors = storage.read_table(str(tmp_path / f"embeddings/{key}.parquet"))
    assert vectors["readout"].to_pylist() == ["prompt", "query", "query"] * 2
