"""Whatever is sent, the service answers, and what it answers is as its OpenAPI document says."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from serve_data import SESSION, Models, gateway, read_as

from rgalign_ray.serve import web
from rgalign_ray.serve.access import Access
from rgalign_ray.serve.feedback import FeedbackLog
from rgalign_ray.serve.query_store import QueryStore

load_all_checks()
SETTINGS = SchemathesisConfig.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": [404, 405, 413, 422]}}}
)
MALFORMED = 10_000
WARM = 2_000
"""Bodies until everything is allocated that stays so."""
GROWTH_MIB = 8.0
DEEP = json.loads("[" * 500 + "]" * 500)
WRONG = [None, -1, 2**70, 1e308, "", "\x00", "x" * 5000, [], {}, [[]], {"a": {"b": []}}, True, "NaN", DEEP]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("served")
    log = FeedbackLog(str(folder / "feedback"), lost=lambda _: None)
    store = QueryStore(str(folder / "store"), "r", dim=4, max_age_s=3600)

    async def ready() -> bool:
        return True

    made = gateway(read_as(folder), Models(), store, log)
    yield web.build(made, ready, Access({}, None), refused=lambda: None)
    store.close()
    log.close()


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> list[schemathesis.APIOperation]:
    document = schemathesis.openapi.from_asgi("/openapi.json", app, config=SETTINGS)
    return [found.ok() for found in document.get_all_operations()]


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_document_allows_and_what_it_does_not(
    operations: list[schemathesis.APIOperation], data: st.DataObject
) -> None:
    operation = data.draw(st.sampled_from(operations))
    case = data.draw(operation.as_strategy(generation_mode=data.draw(st.sampled_from(GenerationMode))))
    # which columns a session may give, and which intents there are, is known to the run and not to the document
    case.call_and_validate(excluded_checks=CHECKS.get_by_names(["positive_data_acceptance"]))


def spoiled(draw: random.Random) -> tuple[str, bytes]:
    """A path, and a body for it that is broken somewhere: its bytes, its structure or a value."""
    whole = {
        "/v1/rank": {"session": SESSION, "k": 2, "candidates": ["i1", "i2"], "explain": False},
        "/v1/rank:batch": {"requests": [{"session": SESSION}, {"session": SESSION, "path": "null"}]},
        "/v1/feedback": {"request_id": "r", "seen": 1, "clicks": ["i1"], "resolved": []},
        "/v1/refresh": {"session": SESSION},
    }
    path = draw.choice(list(whole))
    body = json.loads(json.dumps(whole[path]))
    if draw.random() < 0.6:
        place = body
        while inner := [
            value
            for value in (place.values() if isinstance(place, dict) else place)
            if value and isinstance(value, dict | list)
        ]:
            if draw.random() < 0.3:
                break
            place = draw.choice(inner)
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = draw.choice(WRONG)
        return path, json.dumps(body).encode()
    text = bytearray(json.dumps(body).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text))
        text[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    return path, bytes(text[: draw.randrange(len(text))] if draw.random() < 0.3 else text)


@pytest.mark.slow
def test_malformed_bodies_are_refused_and_leave_nothing_behind(app: FastAPI) -> None:
    draw, answers = random.Random(0), Counter[int]()
    process = psutil.Process()
    with TestClient(app, raise_server_exceptions=False) as http:
        for number in range(MALFORMED):
            if number == WARM:
                before = process.memory_info().rss
            path, body = spoiled(draw)
            answer = http.post(path, content=body, headers={"content-type": "application/json"})
            answers[answer.status_code] += 1
            if answer.status_code != 200:
                assert {"field", "message"} == set(answer.json()[0]), answer.text
    grown = (process.memory_info().rss - before) / 2**20
    assert set(answers) <= {200, 422} and answers[422] > MALFORMED / 2, answers
    assert grown < GROWTH_MIB, f"{grown:.1f} MiB after {MALFORMED - WARM:,} bodies"
