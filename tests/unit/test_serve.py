"""The gateway and its HTTP, with models that answer as they are told."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
import time
from concurrent.futures import Future
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from serve_data import INTENTS, SESSION, TEMPLATE, VECTOR, Models, gateway, read_as, variant

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve import api, app, feedback, query_store, web
from rgalign_ray.serve import gateway as gateways
from rgalign_ray.serve.access import Access, RefusedError, digest, digests
from rgalign_ray.serve.feedback import FeedbackLog
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.query_store import Kept, QueryStore
from rgalign_ray.serve.session_reader import SessionError, SessionReader
from rgalign_ray.serve.variants import Variants


@pytest.fixture
def reader(tmp_path: Path) -> SessionReader:
    return read_as(tmp_path)


def ask(made: Gateway, **request: Any) -> api.RankResponse:
    return asyncio.run(made.rank(api.RankRequest.model_validate({"session": SESSION} | request)))


def client(made: Gateway, ready: bool = True, access: Access | None = None) -> TestClient:
    async def answer() -> bool:
        return ready

    return TestClient(web.build(made, answer, access or Access({}, None), refused=lambda: None))


def test_the_reasoner_is_read_and_the_best_intents_come_first(reader: SessionReader) -> None:
    models = Models()
    answer = ask(gateway(reader, models), request_id="r1", k=2)
    assert [intent.intent_id for intent in answer.intents] == ["i0", "i1"]
    assert [intent.propensity for intent in answer.intents] == [1.0, 1.0]
    assert (answer.path, answer.request_id, answer.version, answer.latent_query) == ("live", "r1", "v-default", None)
    assert set(answer.timings_ms) == {"read", "reasoner", "ranker", "total"}
    assert models.scored[0][1:] == ([0, 1, 2, 3, 4, 5], True)
    explained = ask(gateway(reader, models), explain=True)
    assert explained.latent_query == "where is it?" and answer.intents[0].parts is None
    for intent in explained.intents:
        assert intent.parts is not None and sum(intent.parts.model_dump().values()) == intent.score


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
    assert [event["text"] for event in row["history"]] == ["first", "second"], "nor is it kept for the next run"


@pytest.mark.parametrize(
    ("models", "reason"), [(Models(slow_s=5.0), "TimeoutError"), (Models(fails=RuntimeError("dead")), "RuntimeError")]
)
def test_a_reasoner_that_is_late_or_dead_is_done_without(reader: SessionReader, models: Models, reason: str) -> None:
    made = gateway(reader, models, budget_ms=60.0, ranker_ms=20.0)
    answer = ask(made)
    assert answer.path == "null" and len(answer.intents) == 3 and answer.timings_ms["total"] < 1000
    assert models.scored[0][2] is False
    assert made.counts.others == {("fallbacks", reason): 1} and made.counts.answers == {("null", "default"): 1}
    if models.fails:
        with pytest.raises(RuntimeError, match="dead"):
            ask(made, path="live")


def test_a_session_that_the_template_fails_on_is_answered_without_the_reasoner_or_refused(tmp_path: Path) -> None:
    reader = read_as(tmp_path)
    reader.template = reader.template.model_copy(update={"session": "{{ tab.upper() }}: {{ history[0].text }}"})
    store = QueryStore(str(tmp_path / "store"), "r", dim=4, max_age_s=3600)
    made = gateway(reader, Models(), store)
    whole = SESSION | {"ts": "2026-01-02T00:00:00Z"}
    whole |= {"history": [{"event": "chat", "text": "hi", "ts": "2026-01-01T00:00:00Z"}]}
    no_tab = whole | {"features": {"hour": 3}}
    with client(made) as http:
        assert http.post("/v1/rank", json={"session": whole}).json()["path"] == "live"
        for session in (SESSION, no_tab):
            assert http.post("/v1/rank", json={"session": session}).json()["path"] == "null"
            live = {"session": session, "path": "live"}
            for path, body, place in (
                ("/v1/rank", live, "session"),
                ("/v1/rank:batch", {"requests": [{"session": whole}, live]}, "requests.1.session"),
                ("/v1/refresh", {"session": session}, "session"),
            ):
                refused = http.post(path, json=body)
                assert refused.status_code == 422 and refused.json()[0]["field"] == place, refused.text
                assert "let it expect nulls and an empty history" in refused.json()[0]["message"]
    assert made.counts.others == {("fallbacks", "PromptError"): 2} and made.admission.in_work == 0
    store.close()


def test_beyond_what_is_answered_in_time_requests_are_refused_at_once(reader: SessionReader) -> None:
    models = Models()
    made = gateway(reader, models, batch=4, ongoing=4, budget_ms=5000.0)

    async def crowd() -> list[Any]:
        request = api.RankRequest.model_validate({"session": SESSION, "path": "null"})
        together = await asyncio.gather(*[made.rank(request) for _ in range(10)], return_exceptions=True)
        return [*together, await made.rank(request)]

    answers = asyncio.run(crowd())
    assert sum(isinstance(answer, api.RankResponse) for answer in answers[:10]) == 4
    assert {answer.status for answer in answers[:10] if isinstance(answer, RefusedError)} == {429}
    assert isinstance(answers[10], api.RankResponse), "there is room again"
    assert made.counts.others == {("overload", ""): 6} and len(models.scored) == 5
    with pytest.raises(SessionError):
        ask(made, variant="none")
    assert made.admission.in_work == 0


@pytest.mark.parametrize(
    ("models", "path", "late"),
    [
        (Models(slow_ranker_s=60.0), "null", "ranker"),
        (Models(slow_s=60.0), "live", "reasoner"),
        (Models(slow_ranker_s=60.0), "auto", "ranker"),
    ],
)
def test_a_model_that_never_answers_is_not_waited_for(
    reader: SessionReader, tmp_path: Path, models: Models, path: str, late: str
) -> None:
    store = QueryStore(str(tmp_path / "store"), "r", dim=4, max_age_s=3600)
    made = gateway(reader, models, store, wedged_s=0.05)
    asked = {"session": SESSION, "path": path}
    with client(made) as http:
        told = [http.post("/v1/rank", json=asked), http.post("/v1/rank:batch", json={"requests": [asked]})]
        if late == "reasoner":
            told.append(http.post("/v1/refresh", json={"session": SESSION}))
        for refused in told:
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()[0]["message"] == f"the {late} has not answered within 0.05 s"
    assert made.admission.in_work == 0
    store.close()


@pytest.mark.parametrize(("path", "limit"), [("live", 4.0), ("null", 3.2)])
def test_the_ranker_that_is_late_lowers_the_limit_and_the_reasoner_does_not(
    reader: SessionReader, path: str, limit: float
) -> None:
    made = gateway(reader, Models(slow_s=0.1, slow_ranker_s=0.1 * (path == "null")), batch=4, ongoing=4, budget_ms=50.0)
    ask(made, path=path)
    assert made.admission.limit == pytest.approx(limit)


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
        ({"session": {**SESSION, "region": "é" * 41}}, "session.region"),
        ({"session": {**SESSION, "region": "__HIVE_DEFAULT_PARTITION__"}}, "session.region"),
        ({"session": {**SESSION, "ts": "0001-01-01T00:00:00+14:00"}}, "session.ts"),
        ({"session": {**SESSION, "ts": "9999-12-31T23:00:00-10:00"}}, "session.ts"),
        ({"session": {**SESSION, "history": [{"event": "e", "ts": "0001-01-01T00:00+01:00"}]}}, "session.history.0.ts"),
        ({"candidates": ["i1", "i9"]}, "candidates.1"),
        ({"candidates": ["i1", "i1"]}, "candidates"),
        ({"k": 0}, "k"),
        ({"variant": "other"}, "variant"),
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


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 4)], ids=str)
def test_a_text_is_no_list_of_its_letters_whatever_kind_of_list_the_log_has(tmp_path: Path, kind: pa.DataType) -> None:
    log = pa.schema(
        [("tab", pa.string()), ("cards", kind), ("ts", TIMESTAMP), ("history", pa.list_(EVENT))]
    ).empty_table()
    storage.write_table(str(tmp_path / "sessions/dt=2026-01-01/region=SG/0.parquet"), log)
    spec = FeatureSpec.model_validate({"fields": [{"name": "cards", "kind": "multi"}]})
    reader = SessionReader(str(tmp_path), spec, TEMPLATE, spec.history.length)
    cards = ["visa", "amex", "jcb", "none"]
    row = reader.row(api.Session(user_id="u1", region="SG", features={"cards": cards}))
    assert reader.table([row])["cards"].to_pylist() == [cards]
    assert reader._fits["cards"](cards), "else every request takes milliseconds"
    with pytest.raises(SessionError, match=r"^session\.features\.cards: must be of type .*list"):
        reader.row(api.Session(user_id="u1", region="SG", features={"cards": "visa"}))


def test_over_http(reader: SessionReader) -> None:
    made = gateway(reader, Models(), max_body_bytes=2000)
    with client(made) as http:
        one = http.post("/v1/rank", json={"session": SESSION, "candidates": ["i5", "i3"], "path": "null"})
        assert one.status_code == 200 and [each["intent_id"] for each in one.json()["intents"]] == ["i3", "i5"]
        both = http.post("/v1/rank:batch", json={"requests": [{"session": SESSION, "k": k} for k in (1, 2)]})
        assert [len(each["intents"]) for each in both.json()["responses"]] == [1, 2]
        large = http.post("/v1/rank", content=b" " * 3000)
        assert large.status_code == 413 and large.json() == [
            {"field": "", "message": "the body is larger than 2,000 bytes"}
        ]
        assert http.post("/v1/rank", content=iter([b" " * 1500] * 2)).status_code == 413, "whatever it says of its size"
        assert http.post("/v1/rank", content=b"{").status_code == 422
        (served,) = http.get("/v1/models").json()["variants"]
        assert served["features"] == ["hour", "coins", "cards", "tab"] and served["version"] == "v-default"
        assert http.get("/healthz").status_code == 200 and http.get("/readyz").status_code == 200
        document = http.get("/openapi.json").json()
        paths, fields = document["paths"], document["components"]["schemas"]["Event"]["properties"]
        assert all(field["description"] for field in fields.values())
        known = {"/v1/rank", "/v1/rank:batch", "/v1/feedback", "/v1/refresh", "/v1/users/{user_id}", "/v1/models"}
        assert known | {"/healthz", "/readyz"} <= set(paths)
    with client(made, ready=False) as http:
        assert http.get("/readyz").status_code == 503


def test_a_user_gets_one_variant_and_each_its_share(reader: SessionReader) -> None:
    models = Models()
    made = gateway(reader, models)
    made.variants = Variants([variant(reader, models, name, weight) for name, weight in (("a", 3), ("b", 1), ("c", 0))])
    users = [f"user{number}" for number in range(2000)]
    names = [made.variants.of(user).name for user in users]
    assert abs(names.count("a") / len(users) - 0.75) < 0.03 and names.count("c") == 0
    assert names == [made.variants.of(user).name for user in users]
    answer = ask(made, session=SESSION | {"user_id": users[0]})
    assert (answer.variant, answer.version) == (names[0], f"v-{names[0]}")
    assert ask(made, variant="c").variant == "c"
    other = Variants([variant(reader, models, name) for name in ("a", "d")])
    assert 0.4 < np.mean([other.of(user).name == "a" for user in users if made.variants.of(user).name == "a"]) < 0.6


def test_keys_are_asked_for_and_counted_apart(reader: SessionReader) -> None:
    access = Access({"shop": digest("a-key-of-the-shop"), "lab": digest("a-key-of-the-lab!")}, rate_per_minute=2)
    with client(gateway(reader, Models()), access=access) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {b"x-api-key": b"\xe5"}):
            refused = http.get("/v1/models", headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        shop, lab = {"authorization": "Bearer a-key-of-the-shop"}, {"x-api-key": "a-key-of-the-lab!"}
        assert [http.get("/v1/models", headers=shop).status_code for _ in range(3)] == [200, 200, 429]
        late = http.get("/v1/models", headers=shop)
        assert late.status_code == 429 and 1 <= int(late.headers["retry-after"]) <= 60
        assert http.get("/v1/models", headers=lab).status_code == 200
        assert [http.get(path).status_code for path in ("/healthz", "/readyz", "/openapi.json")] == [200] * 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("shop short", "key 1 must be"),
        ("shop a-key-of-the-shop\nshop another-key-of-it", "key 2"),
        ("", "holds no key"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_told_without_the_key(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read"):
        digests(config.Serve(keys=str(file)))
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as met:
        digests(config.Serve(keys=str(file)))
    assert "another" not in str(met.value) and "short" not in str(met.value)


def test_feedback_is_on_the_disk_when_it_is_acknowledged(reader: SessionReader, tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    with client(gateway(reader, Models(), feedback=log)) as http:
        before, to_come = api.now(), SESSION | {"ts": "2099-01-01T00:00:00Z"}
        answer = http.post("/v1/rank", json={"session": to_come, "request_id": "r1"}).json()
        told = {"request_id": "r1", "clicks": [answer["intents"][0]["intent_id"]]}
        assert http.post("/v1/feedback", json=told).json() == {"request_id": "r1"}
        shutil.copytree(tmp_path, tmp_path / "copy")  # as a machine that dies now leaves it
        (file,) = feedback.files(str(tmp_path / "copy"))
        (kept,) = feedback.answers(file)
        assert (kept.request_id, kept.user_id, kept.body["slate"]) == ("r1", "u1", ["i0", "i1", "i2"])
        assert before <= kept.received <= api.now() and kept.ts == datetime(2099, 1, 1)
        assert list(feedback.feedback(file)) == [("r1", {"clicks": ["i0"]})]
        assert http.delete("/v1/users/u1").json() == {"answers": 1}
        (file,) = feedback.files(str(tmp_path))
        assert not list(feedback.answers(file)) and not list(feedback.feedback(file))
        assert [user for user, _ in feedback.forgotten(file)] == ["u1"]
    log.close()
    with client(gateway(reader, Models())) as http:
        assert http.post("/v1/feedback", json=told).status_code == 404


def test_feedback_that_cannot_be_written_is_not_acknowledged(reader: SessionReader, tmp_path: Path) -> None:
    lost: list[int] = []
    log = FeedbackLog(str(tmp_path), lost=lost.append)
    (file,) = feedback.files(str(tmp_path))
    with closing(sqlite3.connect(file)) as other, other:
        other.execute("DROP TABLE feedback")
        other.execute("DROP TABLE answers")
    with client(gateway(reader, Models(), feedback=log)) as http:
        assert http.post("/v1/rank", json={"session": SESSION}).status_code == 200
        refused = http.post("/v1/feedback", json={"request_id": "r1"})
        assert refused.status_code == 507 and "no such table" in refused.json()[0]["message"]
    log.close()
    assert sum(lost) == 1


def test_a_store_that_cannot_be_written_refuses(reader: SessionReader, tmp_path: Path) -> None:
    store = QueryStore(str(tmp_path), "r", dim=4, max_age_s=3600)
    with closing(sqlite3.connect(tmp_path / "r.fresh")) as other, other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON vectors BEGIN SELECT RAISE(FAIL, 'no room'); END")
    with closing(sqlite3.connect(tmp_path / query_store.FORGOTTEN)) as other, other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON users BEGIN SELECT RAISE(FAIL, 'no room'); END")
    with client(gateway(reader, Models(), store)) as http:
        for refused in (http.post("/v1/refresh", json={"session": SESSION}), http.delete("/v1/users/u1")):
            assert refused.status_code == 507 and refused.headers["retry-after"] == "1"
            assert refused.json()[0]["message"] == "it could not be written (no room)"
    store.close()


def test_a_store_that_cannot_be_read_is_passed_over(reader: SessionReader, tmp_path: Path) -> None:
    store = QueryStore(str(tmp_path), "r", dim=4, max_age_s=3600)
    store.put(Kept("u1", api.now(), np.zeros(5, np.float16)))
    made = gateway(reader, Models(), store)
    assert ask(made).path == "live" and ask(made, path="store").path == "null"
    assert made.counts.others == {("fallbacks", "DataError"): 2}
    store.close()


def busy(log: FeedbackLog) -> tuple[threading.Event, Future[int]]:
    """Has the writer at work until the event is set, and what it then says."""
    held = threading.Event()
    first = log._put(lambda _: int(held.wait(60)))
    while not log._waiting.empty():
        time.sleep(0.01)
    return held, first


def test_who_hangs_up_holds_up_nobody_else(reader: SessionReader, tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    made = gateway(reader, Models(), feedback=log)
    held, _ = busy(log)
    called_off = log.told("r0", {})
    assert called_off.cancel()

    async def users() -> None:
        asked = asyncio.create_task(made.told(api.FeedbackRequest(request_id="r1")))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        held.set()
        for _ in range(2):
            await asyncio.wait_for(made.told(api.FeedbackRequest(request_id="r2")), 10)

    asyncio.run(users())
    made.check()
    log.close()
    (file,) = feedback.files(str(tmp_path))
    assert [request_id for request_id, _ in feedback.feedback(file)] == ["r1", "r2", "r2"], "r1 had been asked for"


def test_a_fault_in_one_work_does_not_end_the_writer(tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    with pytest.raises(ZeroDivisionError):
        log._put(lambda _: 1 // 0).result(10)
    assert log.told("r1", {}).result(10) == 1
    log.close()


def test_a_disk_that_does_not_answer_is_waited_for_with_a_deadline(
    reader: SessionReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "WRITTEN_DEADLINE_S", 0.05)
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    held, _ = busy(log)
    with client(gateway(reader, Models(), feedback=log)) as http:
        for refused in (http.post("/v1/feedback", json={"request_id": "r1"}), http.delete("/v1/users/u1")):
            assert refused.status_code == 507 and refused.headers["retry-after"] == "1"
            assert refused.json()[0]["message"] == "the disk has not taken it within 0.05 s"
    held.set()
    log.close()


def test_a_gateway_whose_writer_has_ended_says_so_and_is_started_anew(reader: SessionReader, tmp_path: Path) -> None:
    lost: list[int] = []
    log = FeedbackLog(str(tmp_path), lost=lost.append)
    made = gateway(reader, Models(), feedback=log)
    deployed, check_health = SimpleNamespace(gateway=made), app.GatewayDeployment.func_or_class.check_health
    with client(made) as http:
        assert http.get("/healthz").status_code == 200
        check_health(deployed)
        log.close()
        for path in ("/healthz", "/readyz"):
            refused = http.get(path)
            assert refused.status_code == 503 and refused.json()[0]["message"] == "the writer of feedback has ended"
        assert http.post("/v1/feedback", json={"request_id": "r1"}).status_code == 507
        assert http.post("/v1/rank", json={"session": SESSION}).status_code == 200
    with pytest.raises(RuntimeError, match="writer of feedback"):
        check_health(deployed)
    assert lost == [1]


def test_feedback_is_refused_where_the_disk_is_behind(
    reader: SessionReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "MOST_WAITING", 1)
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    held, first = busy(log)
    log.shown(feedback.Answer("r0", "u", datetime(2026, 1, 1), {}))
    with client(gateway(reader, Models(), feedback=log)) as http:
        refused = http.post("/v1/feedback", json={"request_id": "r1"})
    assert refused.status_code == 507 and "others wait for the disk" in refused.json()[0]["message"]
    held.set()
    assert first.result(10) == 1
    log.close()


def test_whoever_is_answered_can_be_forgotten_whatever_her_id(reader: SessionReader, tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path), lost=lambda _: None)
    with client(gateway(reader, Models(), feedback=log)) as http:
        for user_id in ("a/b", "/", "a/b/", "?", "../u1", "x" * 200):
            assert http.post("/v1/rank", json={"session": SESSION | {"user_id": user_id}}).status_code == 200
            assert http.delete(f"/v1/users/{quote(user_id, safe='')}").json() == {"answers": 1}, user_id
        for user_id in ("", "x" * 201):
            refused = http.delete(f"/v1/users/{user_id}")
            assert refused.status_code == 422 and refused.json()[0]["field"] == "user_id"
    log.close()


def test_a_situation_that_is_read_again_is_what_is_looked_up(reader: SessionReader, tmp_path: Path) -> None:
    now = datetime.now(UTC).replace(tzinfo=None)
    old = query_store.Kept("u1", now - timedelta(hours=2), np.zeros(4, np.float16), "old")
    query_store.write(str(tmp_path), "r", [old])
    store = QueryStore(str(tmp_path), "r", dim=4, max_age_s=3600 * 24)
    models = Models()
    with client(gateway(reader, models, store)) as http:
        assert http.post("/v1/rank", json={"session": SESSION}).json()["latent_query"] == "old"
        to_come = SESSION | {"ts": "2099-01-01T00:00:00Z"}
        assert http.post("/v1/refresh", json={"session": to_come}).json() == {"variants": ["default"]}
        found = store.get("u1")
        assert found is not None and found[0].tolist() == VECTOR.tolist()
        http.delete("/v1/users/u1")
        assert store.get("u1") is None
        assert http.post("/v1/rank", json={"session": SESSION}).json()["path"] == "live"
    store.close()
