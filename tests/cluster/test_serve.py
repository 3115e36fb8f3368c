"""A run's pair, served over HTTP by Ray Serve, answers as evaluation scored it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.loop import controller
from rgalign_ray.ops.local_cluster import free_port
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.serve import api, app

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

SESSIONS = 40
TOLERANCE = 1e-4
"""Sessions are read in batches of other widths than evaluation's."""


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a first ranker, as its user serves it: under other settings of the service."""
    folder = tmp_path_factory.mktemp("served")
    settings = config.load("smoke", ["world.sessions=900", "ranker.epochs=2", f"run_dir={folder}"])
    controller.run(settings, until="rankers_0")
    return config.changed(settings, {"serve.round": 0, "serve.port": free_port(), "serve.batch_wait_ms": 20.0})


@pytest.fixture(scope="module")
def log(run: Config) -> pa.Table:
    """Test sessions, whose e(x) evaluation has read."""
    table = storage.read_table(f"{run.run_dir}/sessions/sessions")
    return table.filter(pa.compute.equal(table["role"], "test")).slice(0, SESSIONS)


@pytest.fixture(scope="module")
def scores(run: Config, log: pa.Table) -> dict[str, np.ndarray]:
    """By readout, [sessions, intents] as evaluation has them."""
    loaded = scoring.load(f"{run.run_dir}/rankers_0/qe_rec")
    catalogue = Catalogue.load(f"{run.run_dir}/sessions")
    rows = examples(log, loaded.space, catalogue)
    order = np.argsort(rows["candidates"], axis=1)
    embeddings = Embeddings.load(f"{run.run_dir}/embeddings_0")
    return {
        path: np.take_along_axis(
            scoring.score_sessions(
                loaded, rows, space_version=loaded.space.version, readout="prompt", embeddings=vectors
            ),
            order,
            axis=1,
        )
        for path, vectors in (("live", embeddings), ("null", None))
    }


def bodies(log: pa.Table, features: list[str], path: Any) -> list[dict[str, Any]]:
    made = []
    for row in log.to_pylist():
        given = {name: row[name] for name in ("user_id", "region", "ts", "history")}
        session = api.Session(**given, features={name: row[name] for name in features})
        request = api.RankRequest(session=session, path=path, k=100, request_id=row["session_id"])
        made.append(request.model_dump(mode="json"))
    return made


@pytest.fixture(scope="module")
def address(run: Config) -> Iterator[str]:
    app.run(run, blocking=False)
    yield f"http://127.0.0.1:{run.serve.port}"
    from ray import serve

    serve.shutdown()


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=60
    ) as it:
        return json.loads(it.read())


@pytest.mark.parametrize("path", ["live", "null"])
def test_scores_are_those_of_evaluation(
    address: str, run: Config, log: pa.Table, scores: dict[str, np.ndarray], path: str
) -> None:
    (model,) = call(f"{address}/v1/models")
    assert call(f"{address}/readyz") == {"status": "ready"} and model["round"] == 0 and model["intents"] == 87
    ids = Catalogue.load(f"{run.run_dir}/sessions").ids
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: call(f"{address}/v1/rank", body), bodies(log, model["features"], path)))
    for answer, expected in zip(answers, scores[path], strict=True):
        found = {intent["intent_id"]: intent["score"] for intent in answer["intents"]}
        np.testing.assert_allclose([found[intent] for intent in ids], expected, atol=TOLERANCE)
        assert answer["path"] == path and answer["version"] == model["version"]
    assert [answer["request_id"] for answer in answers] == log["session_id"].to_pylist()
    if path == "live":
        assert np.abs(scores["live"] - scores["null"]).max() > 10 * TOLERANCE, "the query is read"


def test_a_wrong_field_is_named_over_http(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as met:
        call(f"{address}/v1/rank", {"session": {"user_id": "u", "region": "SG", "features": {"hour": "noon"}}})
    assert met.value.code == 422 and json.loads(met.value.read())[0]["field"] == "session.features.hour"


def test_what_is_not_there_cannot_be_served(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: .* holds no run; `rgalign loop` makes one"):
        app.pair_of(config.changed(run, {"run_dir": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"^serve.round: .* has no whole rankers_1; `rgalign loop` makes it"):
        app.pair_of(config.changed(run, {"serve.round": 1}))
