"""What tells one served pair from another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from rgalign_ray import config
from rgalign_ray.logs.prompts import Template
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner.engine import EngineSpec
from rgalign_ray.serve.pair import PairSpec


def reads(prompt: Template, tokens: int, version: str) -> str:
    meta = cast(scoring.Meta, SimpleNamespace(reasoner_version=version))
    return PairSpec("", "", "", EngineSpec(config.Reasoner(), tokens, None), prompt, 0, meta, False).reads


def test_vectors_are_shared_where_the_same_reasoner_reads_the_same_of_a_session() -> None:
    shop = Template.load("shop")
    other = shop.model_copy(update={"prefix": "Else."})
    assert reads(shop, 256, "tiny") == reads(shop, 256, "tiny")
    assert len({reads(shop, 256, "tiny"), reads(other, 256, "tiny"), reads(shop, 128, "tiny")}) == 3
    assert reads(shop, 256, "tiny+1.sft@0") != reads(shop, 256, "tiny+1.sft@1")
