"""The encode pass as a plain class: queries that are written already are read with their session's text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray.data import DataContext
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import DataError, InfrastructureError
from rgalign_ray.logs import stream
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner.engine import EngineSpec, Prompts
from rgalign_ray.rollout.encode import (
    EncodePlan,
    SessionEncoder,
    _kept_context,
    as_user_errors,
    encode,
    session_texts,
    written_queries,
)
from rgalign_ray.rollout.worker import vectors_table

ENCODER = EngineSpec(config.Compare().encoder, max_session_tokens=32, weights=None)
MODELS = ({"model": "tiny"}, {"engine": "transformers"}, {"dtype": "bfloat16"}, {"device": "cuda"}, {"threads": 2})
SAMPLINGS = ({"temperature": 0.9}, {"top_p": 0.5}, {"max_new_tokens": 8})


@pytest.fixture
def written(tmp_path: Path) -> str:
    """What a reasoner left: e(x) of three sessions, and a valid query of two."""
    ids = ["s0", "s1", "s2", "s0", "s2"]
    readouts = ["prompt"] * 3 + ["query"] * 2
    queries = [None, None, None, "where is my parcel", "refund please"]
    table = vectors_table(ids, readouts, [-1] * 3 + [0] * 2, queries, np.ones((5, 4), np.float16), "llm")
    storage.write_table(str(tmp_path / "queries/all.parquet"), table)
    return str(tmp_path / "queries")


def test_written_queries_are_those_of_the_query_readout(written: str) -> None:
    assert written_queries(written) == {"s0": "where is my parcel", "s2": "refund please"}


def test_what_was_kept_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EncodePlan(
        log_uri="",
        template=Template.load("shop"),
        roles=("rank",),
        queries_for=(),
        query_sessions=(),
        encode=config.Encode(batch_size=2, query_share=0.0),
        sampling=config.Rollout(),
        run_seed=0,
        kept_uri=str(tmp_path / "kept"),
    )
    batch = pa.table({"session_id": ["s0", "s1"], "role": ["rank"] * 2, "text": ["order late", "new phone"]})
    first = SessionEncoder(ENCODER, plan, str(tmp_path / "first"))
    first(batch)
    other = SessionEncoder(
        ENCODER, replace(plan, encode=config.Encode(batch_size=1, query_share=0.0)), str(tmp_path / "other")
    )
    again = SessionEncoder(ENCODER, replace(plan, run_seed=1), str(tmp_path / "again"))  # no query, nothing drawn
    read: list[str] = []
    for encoder, name in ((other, "other"), (again, "again")):
        embed = encoder.engine.embed
        monkeypatch.setattr(
            encoder.engine, "embed", lambda prompts, name=name, embed=embed: read.append(name) or embed(prompts)
        )
        encoder(batch)
    assert set(read) == {"other"}, "a batch of another size may differ in the last bit"
    first_file, same = (next((tmp_path / name).iterdir()) for name in ("first", "again"))
    assert first_file.name == same.name
    assert storage.read_table(str(first_file)).equals(storage.read_table(str(same)))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_is_kept_for_other_runs_is_known_by_all_that_decides_it() -> None:
    shop = Template.load("shop")
    plan = EncodePlan("", shop, ("rank",), (), (), config.Encode(), config.Rollout(), run_seed=0)
    readers = [
        (ENCODER, plan),
        (replace(ENCODER, max_session_tokens=16), plan),
        *((replace(ENCODER, reasoner=ENCODER.reasoner.model_copy(update=change)), plan) for change in MODELS),
        (ENCODER, replace(plan, template=shop.model_copy(update={"prefix": "Else."}))),
        (ENCODER, replace(plan, encode=config.Encode(batch_size=8))),
    ]
    samplers = [
        (ENCODER, replace(plan, run_seed=1)),
        *((ENCODER, replace(plan, sampling=config.Rollout.model_validate(change))) for change in SAMPLINGS),
    ]
    assert len({_kept_context(*one, sampled=False) for one in readers}) == len(readers)
    assert len({_kept_context(*one, sampled=True) for one in readers + samplers}) == len(readers + samplers)
    for one in samplers:
        assert _kept_context(*one, sampled=False) == _kept_context(ENCODER, plan, sampled=False), "nothing is drawn"


def test_a_written_query_is_read_with_its_session(written: str, tmp_path: Path) -> None:
    plan = EncodePlan(
        log_uri="",
        template=Template.load("shop"),
        roles=("audit",),
        queries_for=("audit",),
        query_sessions=(),
        encode=config.Encode(batch_size=2),
        sampling=config.Rollout(),
        run_seed=0,
        written_uri=written,
    )
    texts = ["order late", "new phone", "paid twice"]
    batch = pa.table({"session_id": ["s0", "s1", "s2"], "role": ["audit", "valid", "audit"], "text": texts})
    counts = SessionEncoder(ENCODER, plan, str(tmp_path / "out"))(batch).to_pylist()[0]
    assert (counts["sessions"], counts["sampled"], counts["valid"]) == (3, 2, 2)
    table = storage.read_table(str(tmp_path / "out"))
    found = {
        (row["id"], row["readout"]): (row["query"], np.array(row["embedding"], np.float32)) for row in table.to_pylist()
    }
    assert set(found) == {("s0", "prompt"), ("s0", "query"), ("s1", "prompt"), ("s2", "prompt"), ("s2", "query")}
    engine = ENCODER.start()
    for (session, readout), (query, vector) in found.items():
        text = texts[int(session[1])]
        expected = engine.embed(Prompts("", [f"{query} {text}" if readout == "query" else text], ""))[0]
        np.testing.assert_allclose(vector, expected.astype(np.float32), atol=3e-3)
        assert query == {"s0": "where is my parcel", "s2": "refund please"}.get(session) or readout == "prompt"


def test_sessions_that_clicked_nothing_can_be_left_unread() -> None:
    clicks = [[False, True], [False, False], [False, False], [True, False], [False, False]]
    roles = ["rank", "audit", "valid", "test", "align_1"]
    table = pa.table({"session_id": list("abcde"), "role": roles, "clicks": clicks, "ts": [None] * 5})
    template = Template(version="t", prefix="", session="hello", suffix="", item="{{ title }}")
    table = table.set_column(3, "ts", pa.nulls(5, schema.TIMESTAMP)).append_column(
        "history", pa.array([[]] * 5, pa.list_(schema.EVENT))
    )
    assert session_texts(table, template)["session_id"].to_pylist() == list("abcde")
    assert session_texts(table, template, unclicked=False)["session_id"].to_pylist() == list("acd")


def test_what_a_template_says_in_the_pass_comes_back_as_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        context = DataContext()

        def map_batches(self, *args: object, **settings: object) -> Failing:
            return self

        def iter_batches(self, **settings: object) -> list:
            said = DataError(
                "prompt.template: fails on session 's1'.\nFailed to apply UDF transform after 1/1 attempts."
            )
            raise RayTaskError("map", "a traceback", said)

    monkeypatch.setattr(stream, "sessions", lambda *args, **settings: Failing())
    plan = EncodePlan(
        log_uri="",
        template=Template.load("shop"),
        roles=("rank",),
        queries_for=(),
        query_sessions=(),
        encode=config.Encode(),
        sampling=config.Rollout(),
        run_seed=0,
    )
    with pytest.raises(DataError) as error:
        encode(plan, ENCODER, "", lambda sessions: None)
    assert type(error.value) is DataError
    assert str(error.value) == "prompt.template: fails on session 's1'."
    assert DataContext.get_current().raise_original_map_exception, "else Ray Data hides what was said"


def test_an_encoder_that_cannot_start_says_why_and_one_that_died_is_a_sentence() -> None:
    with pytest.raises(RayActorError, match="no such model"), as_user_errors("encode", config.Encode()):
        raise RayActorError(error_msg="no such model", actor_init_failed=True)
    for died in (RayActorError(), OutOfMemoryError("1 worker(s) were killed")):
        with (
            pytest.raises(InfrastructureError, match=r"encode: an encoder died more"),
            as_user_errors("encode", config.Encode()),
        ):
            raise died
