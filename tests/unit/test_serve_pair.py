"""What tells one served pair from another."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
from serve_data import SESSION, read_as

from rgalign_ray import config, storage
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.readers import engine_of_run, engine_spec, keep_reader
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner.engine import EngineSpec
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve import api
from rgalign_ray.serve.pair import PairSpec


def reads(prompt: Template, tokens: int, version: str) -> str:
    meta = cast(scoring.Meta, SimpleNamespace(reasoner_version=version))
    return PairSpec("", "", "", EngineSpec(config.Reasoner(), tokens, None), prompt, 0, meta, False, "click").reads


def test_vectors_are_shared_where_the_same_reasoner_reads_the_same_of_a_session() -> None:
    shop = Template.load("shop")
    other = shop.model_copy(update={"prefix": "Else."})
    assert reads(shop, 256, "tiny") == reads(shop, 256, "tiny")
    assert len({reads(shop, 256, "tiny"), reads(other, 256, "tiny"), reads(shop, 128, "tiny")}) == 3
    assert reads(shop, 256, "tiny+1.sft@0") != reads(shop, 256, "tiny+1.sft@1")


def test_a_pair_reads_as_it_was_trained_whatever_a_later_try_has_asked_for(tmp_path: Path) -> None:
    run = Run(config.validate({"run_dir": str(tmp_path), "reasoner": {"model": "tiny", "dtype": "float32"}}))
    keep_reader(engine_spec(run, 0), run.uri("embeddings_0"))
    later = Run(
        config.validate(
            {
                "run_dir": str(tmp_path),
                "reasoner": {"model": "tiny", "dtype": "bfloat16"},
                "prompt": {"max_session_tokens": 9},
            }
        )
    )
    assert engine_of_run(later, 0) == engine_spec(run, 0) != engine_spec(later, 0)
    assert engine_of_run(later, 1) == engine_spec(later, 1), "nothing is kept of it"
    storage.write_json(run.uri("embeddings_0", "reader.json"), {"dtype": "float32", "max_session_tokens": 64})
    before = engine_of_run(later, 0).reasoner
    assert (before.pooling, before.depth) == ("last", 1.0), "all were, when nothing was said of it"


def test_the_service_reads_as_much_history_as_training_did(tmp_path: Path) -> None:
    """Requests, and the log that is read ahead, may hold more."""
    reader = read_as(tmp_path)
    reader.history_length = 3
    when = [datetime(2026, 1, day + 1, tzinfo=UTC) for day in range(6)]
    events = [{"event": "view", "text": str(day), "ts": ts} for day, ts in enumerate(when)]
    asked = api.Session(**SESSION, ts=when[-1], history=events[::-1])
    assert reader.texts([reader.row(asked)]) == ["open: 5, 4, 3"]
    history = pa.array([events], pa.list_(EVENT))
    log = pa.table({"tab": ["open"], "ts": pa.array(when[-1:], TIMESTAMP), "history": history})
    assert reader.texts_of(log) == ["open: 5, 4, 3"]
