"""The gateway and its HTTP, with models that answer as they are told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from rgalign_ray import config, storage
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve import api, web
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.session_reader import SessionReader

SPEC = FeatureSpec.model_validate(
    {
        "fields": [
            {"name": "region", "kind": "categorical"},
            {"name": "hour", "kind": "numeric"},
            {"name": "coins", "kind": "numeric"},
            {"name": "cards", "kind": "multi"},
        ]
    }
)
TEMPLATE = Template(
    version="t", prefix="", session="{{ tab }}: {{ history | map(attribute='text') | join(', ') }}", suffix="", item=""
)
SESSION = {"user_id": "u1", "region": "SG", "features": {"tab": "open", "hour": 3, "cards": ["visa"]}}
INTENTS = [f"i{number}" for number in range(6)]
VECTOR = np.ones(4, np.float16)


@pytest.fixture
def reader(tmp_path: Path) -> SessionReader:
    columns = {
        "tab": pa.string(),
        "hour": pa.float32(),
        "coins": pa.int32(),
        "cards": pa.list_(pa.string()),
        "ts": TIMESTAMP,
        "history": pa.list_(EVENT),
    }
    log = pa.schema(list(columns.items())).empty_table()
    storage.write_table(str(tmp_path / "sessions/dt=2026-01-01/region=SG/0.parquet"), log)
    return SessionReader(str(tmp_path), SPEC, TEMPLATE)


class Models:
    """What the gateway waits for."""

    def __init__(self, slow_s: float = 0.0, fails: Exception | None = None) -> None:
        self.slow_s, self.fails = slow_s, fails
        self.read_texts: list[str] = []
        self.scored: list[tuple[dict[str, Any], list[int], bool]] = []

    async def read(self, text: str, seed: int | None) -> tuple[np.ndarray, str | None]:
        self.read_texts.append(text)
        await asyncio.sleep(self.slow_s)
        if self.fails:
            raise self.fails
        return VECTOR, None if seed is None else "where is it?"

    async def score(self, row: dict[str, Any], candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        self.scored.append((row, candidates.tolist(), vector is not None))
        return -candidates.astype(np.float32)


def gateway(reader: SessionReader, models: Models, store: Any = None, **settings: Any) -> Gateway:
    intents = pa.table(dict.fromkeys(("intent_id", "title", "description", "category"), INTENTS))
    version = api.ServedVersion(version="v", reasoner="r", ranker="k", round=1, intents=6, features=reader.features)
    it = config.Serve.model_validate(settings)
    return Gateway(it, reader, Catalogue(intents), version, models.read, models.score, store)


def ask(made: Gateway, **request: Any) -> api.RankResponse:
    return asyncio.run(made.rank(api.RankRequest.model_validate({"session": SESSION} | request)))


def client(made: Gateway, ready: bool = True) -> TestClient:
    async def answer() -> bool:
        return ready

    return TestClient(web.build(made, answer))


def test_the_reasoner_is_read_and_the_best_intents_come_first(reader: SessionReader) -> None:
    models = Models()
    answer = ask(gateway(reader, models), request_id="r1", k=2)
    assert [intent.intent_id for intent in answer.intents] == ["i0", "i1"]
    assert [intent.propensity for intent in answer.intents] == [1.0, 1.0]
    assert (answer.path, answer.request_id, answer.version, answer.latent_query) == ("live", "r1", "v", None)
    assert set(answer.timings_ms) == {"read", "reasoner", "ranker", "total"}
    assert models.scored[0][1:] == ([0, 1, 2, 3, 4, 5], True)
    assert ask(gateway(reader, models), explain=True).latent_query == "where is it?"


def test_history_is_read_in_order_in_utc_and_not_from_after_the_entry(reader: SessionReader) -> None:
    entry = datetime(2026, 1, 1, 12, tzinfo=UTC)
    zoned = (entry - timedelta(hours=2)).isoformat().replace("+00:00", "Z")
    history = [
        {"event": "late", "text": "later", "ts": (entry + timedelta(hours=1)).isoformat()},
        {"event": "chat", "text": "second", "ts": zoned},
        {"event": "chat", "text": "first", "ts": "2026-01-01T08:00:00+02:00"},
    ]
    models = Models()
    ask(gateway(reader, models), session=SESSION | {"ts": entry.isoformat(), "history": history})
    assert models.read_texts == ["open: second, first"], "newest first, as the template has it"
    row = models.scored[0][0]
    assert row["ts"] == datetime(2026, 1, 1, 12) and row["coins"] is None


@pytest.mark.parametrize(
    ("models", "reason"), [(Models(slow_s=5.0), "TimeoutError"), (Models(fails=RuntimeError("dead")), "RuntimeError")]
)
def test_a_reasoner_that_is_late_or_dead_is_done_without(reader: SessionReader, models: Models, reason: str) -> None:
    made = gateway(reader, models, budget_ms=60.0, ranker_ms=20.0)
    answer = ask(made)
    assert answer.path == "null" and len(answer.intents) == 3 and answer.timings_ms["total"] < 1000
    assert models.scored[0][2] is False
    assert made.fallbacks == {reason: 1}
    if models.fails:
        with pytest.raises(RuntimeError, match="dead"):
            ask(made, path="live")


def test_a_kept_vector_comes_before_the_reasoner(reader: SessionReader) -> None:
    class Store:
        def get(self, user_id: str) -> tuple[np.ndarray, str | None] | None:
            return (VECTOR, "kept") if user_id == "u1" else None

    models = Models()
    made = gateway(reader, models, Store())
    known = ask(made)
    assert (known.path, known.latent_query, models.read_texts) == ("store", "kept", [])
    assert ask(made, session=SESSION | {"user_id": "u2"}).path == "live"
    assert ask(made, path="null").path == "null"
    assert ask(made, session=SESSION | {"user_id": "u2"}, path="store").path == "null", "nothing is kept for her"


def test_what_is_drawn_has_its_probability_and_is_drawn_alike_for_a_request(reader: SessionReader) -> None:
    made = gateway(reader, Models(), explore_temperature=1.0)
    drawn = [ask(made, request_id=f"r{number}", k=2) for number in range(300)]
    assert ask(made, request_id="r7", k=2).intents == drawn[7].intents
    weights = np.exp(-np.arange(6.0))
    for answer in drawn:
        left = weights.copy()
        for intent in answer.intents:
            place = INTENTS.index(intent.intent_id)
            assert intent.propensity == pytest.approx(left[place] / left.sum())
            left[place] = 0
    first = np.mean([answer.intents[0].intent_id == "i0" for answer in drawn])
    assert abs(first - weights[0] / weights.sum()) < 0.1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"session": {**SESSION, "features": {"hour": "noon"}}}, "session.features.hour"),
        ({"session": {**SESSION, "features": {"coins": 2**40}}}, "session.features.coins"),
        ({"session": {**SESSION, "features": {"cards": "visa"}}}, "session.features.cards"),
        ({"session": {**SESSION, "features": {"need": "x"}}}, "session.features.need"),
        ({"session": {"user_id": "u1"}}, "session.region"),
        ({"candidates": ["i1", "i9"]}, "candidates.1"),
        ({"candidates": ["i1", "i1"]}, "candidates"),
        ({"k": 0}, "k"),
        ({"clicks": [True]}, "clicks"),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(reader: SessionReader, changes: dict[str, Any], field: str) -> None:
    with client(gateway(reader, Models())) as http:
        for path, body, where in (
            ("/v1/rank", {"session": SESSION} | changes, field),
            (
                "/v1/rank:batch",
                {"requests": [{"session": SESSION}, {"session": SESSION} | changes]},
                f"requests.1.{field}",
            ),
        ):
            answer = http.post(path, json=body)
            assert answer.status_code == 422 and [each["field"] for each in answer.json()] == [where], answer.text


def test_over_http(reader: SessionReader) -> None:
    made = gateway(reader, Models(), max_body_bytes=2000)
    with client(made) as http:
        one = http.post("/v1/rank", json={"session": SESSION, "candidates": ["i5", "i3"], "path": "null"})
        assert one.status_code == 200 and [each["intent_id"] for each in one.json()["intents"]] == ["i3", "i5"]
        both = http.post("/v1/rank:batch", json={"requests": [{"session": SESSION, "k": k} for k in (1, 2)]})
        assert [len(each["intents"]) for each in both.json()["responses"]] == [1, 2]
        assert http.post("/v1/rank", content=b" " * 3000).status_code == 413
        assert http.post("/v1/rank", content=iter([b" " * 1500] * 2)).status_code == 413, "whatever it says of its size"
        assert http.post("/v1/rank", content=b"{").status_code == 422
        assert http.get("/v1/models").json()[0]["features"] == ["hour", "coins", "cards", "tab"]
        assert http.get("/healthz").status_code == 200 and http.get("/readyz").status_code == 200
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/v1/rank", "/v1/rank:batch", "/v1/models", "/healthz", "/readyz"} <= set(paths)
    with client(made, ready=False) as http:
        assert http.get("/readyz").status_code == 503
