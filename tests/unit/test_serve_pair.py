"""What tells one served pair from another."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from serve_data import SESSION, read_as

from rgalign_ray import config, storage
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.readers import engine_of_run, engine_spec, keep_reader
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner.engine import EngineSpec
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve import api, pair
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


def test_device_and_threads_are_where_it_is_served_and_all_else_is_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {"model": "tiny", "dtype": "float32", "device": "cuda", "threads": 8}
    made = config.validate({"run_dir": str(tmp_path), "reasoner": trained})
    run = Run(made)
    storage.write_json(run.uri("config.json"), made.model_dump(mode="json"))
    for stage in ("sessions", "rankers_0"):
        storage.write_json(run.uri(stage, storage.MANIFEST), storage.Manifest(stage=stage, key="k").model_dump())
    keep_reader(engine_spec(run, 0), run.uri("embeddings_0"))
    Template.load("shop").keep(run.uri("embeddings_0"))
    meta = SimpleNamespace(reasoner_version="tiny", version="1")
    monkeypatch.setattr(scoring, "load_meta", lambda _: meta)
    here = {"model": "smollm2", "dtype": "bfloat16", "device": "cpu", "threads": 2}
    (spec,) = pair.pairs(config.validate({"run_dir": str(tmp_path), "reasoner": here})).values()
    assert spec.engine.reasoner == made.reasoner.model_copy(
        update={"engine": "transformers", "device": "cpu", "threads": 2}
    )
    assert pair.find(str(tmp_path)).engine == engine_spec(run, 0)
    assert pair.find(str(tmp_path)).source == spec.source, "they change no version"
    versions = pair.Versions[PairSpec](lambda its: its, config.Reasoner(device="cpu", threads=2))
    assert versions.get(spec.source) == spec, "so it is where the model is loaded"


def served(folder: Path, rows: list[dict[str, Any]]) -> PairSpec:
    """A pair whose log holds these test sessions."""
    reader = read_as(folder)
    storage.delete(str(folder / "sessions"))  # which has no role
    types: list[Any] = [("session_id", pa.string()), ("user_id", pa.string()), ("role", pa.string())]
    stored = pa.schema([*types, *(field for field in reader.schema if field.name != "region")])
    table = pa.Table.from_pylist([{"role": "test"} | row for row in rows], schema=stored)
    storage.write_table(str(folder / "sessions/dt=2026-01-01/region=A%2FB/0.parquet"), table)
    return cast(PairSpec, SimpleNamespace(sessions_uri=str(folder), reader=lambda: reader))


def test_the_region_is_the_folder_of_the_file_wherever_the_run_lies(tmp_path: Path) -> None:
    spec = served(tmp_path / "region=SG/run", [{"session_id": "s1", "user_id": "u1", "ts": datetime(2026, 1, 1)}])
    (row,) = pair.example_sessions(spec, 3)
    assert row["region"] == "A/B"


def test_examples_are_sessions_that_the_service_would_answer(tmp_path: Path) -> None:
    entry = datetime(2026, 1, 2)
    said = {"longest": "x" * 4001, "long": "x" * 4000, "short": "x", "silent": ""}
    rows = [
        {"session_id": name, "user_id": "u1", "ts": entry, "history": [{"event": "chat", "text": text, "ts": entry}]}
        for name, text in said.items()
    ]
    found = pair.example_sessions(served(tmp_path, rows), 2)
    assert [row["session_id"] for row in found] == ["long", "short"]
