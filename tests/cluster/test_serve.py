"""A run's pair, served over HTTP by Ray Serve, answers as evaluation scored it."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from rgalign_ray import config, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.loop import controller
from rgalign_ray.ops.local_cluster import free_port
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.serve import api, app, pair
from rgalign_ray.serve.collect import collect
from rgalign_ray.serve.query_store import QueryStore
from rgalign_ray.serve.read_ahead import read_ahead

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

SESSIONS = 40
TOLERANCE = 1e-4
"""Sessions are read in batches of other widths than evaluation's."""


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a first ranker, as its user serves it: under other settings of the service, and elsewhere than where
    the file of its prompt was.
    """
    folder = tmp_path_factory.mktemp("served")
    prompt = folder / "prompt.yaml"
    prompt.write_bytes((files("rgalign_ray") / "configs/prompts/shop.yaml").read_bytes())
    words = ["world.sessions=900", "ranker.epochs=2", f"run_dir={folder}", f"prompt.template={prompt}"]
    settings = config.load("smoke", words)
    controller.run(settings, until="rankers_0")
    prompt.unlink()
    serves = {"port": free_port(), "batch_wait_ms": 20.0, "watch_s": 1.0, "rankers": 2}
    serves["budget_ms"] = 60_000.0  # how soon is not asked here: where answers come late, others are refused (429)
    serves |= {"feedback": str(folder / "feedback"), "store": str(folder / "store")}
    return config.changed(settings, {f"serve.{name}": value for name, value in serves.items()})


@pytest.fixture(scope="module")
def log(run: Config) -> pa.Table:
    """Test sessions, whose e(x) evaluation has read."""
    table = storage.read_table(f"{run.run_dir}/sessions/sessions")
    return table.filter(pa.compute.equal(table["role"], "test")).slice(0, SESSIONS)


@pytest.fixture(scope="module")
def scores(run: Config, log: pa.Table) -> dict[str, np.ndarray]:
    """By readout, [sessions, intents] as evaluation has them."""
    loaded = scoring.load(f"{run.run_dir}/rankers_0/qe_rec", run.evaluate.rank_by)
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


def bodies(run: Config, log: pa.Table, path: Any) -> list[dict[str, Any]]:
    reader, made = pair.find(run.run_uri, 0).reader(), []
    for row in log.to_pylist():
        request = api.RankRequest(session=reader.session(row), path=path, k=100, request_id=row["session_id"])
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


def test_users_that_were_read_ahead_are_looked_up(run: Config, log: pa.Table) -> None:
    """Before there is a service, which would take the room that Ray Data needs."""
    spec = pair.find(run.run_uri, 0)
    assert run.serve.store is not None
    users = read_ahead(spec, f"{run.run_dir}/sessions", None, run.serve.store, run.encode)
    sessions = storage.read_table(f"{run.run_dir}/sessions/sessions", columns=["user_id"])
    assert users == len(pa.compute.unique(sessions["user_id"]))
    store = QueryStore(run.serve.store, spec.reads, spec.dim, max_age_s=1e9)
    newest = {row["user_id"]: row["session_id"] for row in log.sort_by("ts").to_pylist()}
    embeddings = Embeddings.load(f"{run.run_dir}/embeddings_0")
    user, session = newest.popitem()
    found = store.get(user)
    assert found is not None
    expected, known = embeddings.lookup(session_keys([session]), "prompt")
    assert known.all()
    np.testing.assert_allclose(found[0].astype(np.float32), expected[0].astype(np.float32), atol=0.02)
    store.close()


@pytest.mark.parametrize("path", ["live", "null"])
def test_scores_are_those_of_evaluation(
    address: str, run: Config, log: pa.Table, scores: dict[str, np.ndarray], path: str
) -> None:
    (model,) = call(f"{address}/v1/models")["variants"]
    assert call(f"{address}/readyz") == {"status": "ready"} and model["round"] == 0 and model["intents"] == 87
    ids = Catalogue.load(f"{run.run_dir}/sessions").ids
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: call(f"{address}/v1/rank", body), bodies(run, log, path)))
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


def test_scores_taken_apart_add_up(address: str, run: Config, log: pa.Table) -> None:
    body = bodies(run, log.slice(0, 1), "null")[0] | {"explain": True}
    for intent in call(f"{address}/v1/rank", body)["intents"]:
        assert sum(intent["parts"].values()) == pytest.approx(intent["score"], abs=1e-4)


def test_the_page_offers_simulated_users(address: str) -> None:
    with urllib.request.urlopen(address, timeout=60) as page:
        assert (
            b"Before a word is typed" in page.read() and "default-src 'none'" in page.headers["content-security-policy"]
        )
    examples = call(f"{address}/v1/examples")
    assert len(examples) == app.EXAMPLES
    assert call(f"{address}/v1/rank", {"session": examples[0]["session"], "path": "null"})["intents"]


class Asking:
    """Users who ask all the time, and what they are answered; a request that fails ends the test."""

    def __init__(self, address: str, body: dict[str, Any]) -> None:
        self.versions: list[str] = []
        self.failed: list[str] = []
        self.ended = threading.Event()
        self.url, self.body = f"{address}/v1/rank", body
        self.threads = [threading.Thread(target=self.ask) for _ in range(4)]

    def ask(self) -> None:
        while not self.ended.is_set():
            try:
                self.versions.append(call(self.url, self.body)["version"])
            except urllib.error.HTTPError as error:
                self.failed.append(f"{error.code}: {error.read().decode()}")

    def __enter__(self) -> Asking:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()
        assert not self.failed and self.versions


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.fault
def test_versions_change_and_replicas_die_without_a_failed_request(address: str, run: Config, log: pa.Table) -> None:
    folder = Path(run.run_dir)
    (before,) = call(f"{address}/v1/models")["variants"]
    body = bodies(run, log.slice(0, 1), "null")[0]
    loaded = scoring.load(str(folder / "rankers_0/qe_rec"))
    with Asking(address, body | {"request_id": None}) as asking:
        # a round whose reasoner is not there is refused, and said to be
        shutil.copytree(folder / "rankers_0", folder / "rankers_1")
        until(lambda: call(f"{address}/v1/models")["refused"] is not None)
        assert call(f"{address}/v1/models")["variants"] == [before]
        shutil.rmtree(folder / "rankers_1")
        until(lambda: call(f"{address}/v1/models")["refused"] is None)

        # another version takes over
        shutil.copytree(folder / "rankers_0", folder / "new")
        with torch.no_grad():
            loaded.model.prior += torch.randn(len(loaded.model.prior), generator=torch.Generator().manual_seed(0))
        meta = scoring.save(loaded.model, str(folder / "new/qe_rec"), loaded.meta)
        (folder / "rankers_0").rename(folder / "old")
        (folder / "new").rename(folder / "rankers_0")
        until(lambda: call(f"{address}/v1/models")["variants"][0]["ranker"] == meta.version)
        until(lambda: asking.versions[-1].endswith(meta.version))

        # one of two rankers dies
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        rankers = [name for name in names if "Ranker" in name]
        assert len(rankers) == 2
        ray.kill(ray.get_actor(rankers[0], namespace="serve"))
        answered = len(asking.versions)
        until(lambda: len(asking.versions) > answered + 20)
    assert set(asking.versions) == {before["version"], asking.versions[-1]}
    (folder / "rankers_0").rename(folder / "new")
    (folder / "old").rename(folder / "rankers_0")


def test_feedback_becomes_a_log(address: str, run: Config, log: pa.Table, tmp_path: Path) -> None:
    (model,) = call(f"{address}/v1/models")["variants"]
    for body in bodies(run, log, "null"):
        answer = call(f"{address}/v1/rank", body | {"request_id": f"told-{body['request_id']}", "k": 3})
        told = {"request_id": answer["request_id"], "clicks": [answer["intents"][1]["intent_id"]]}
        assert call(f"{address}/v1/feedback", told) == {"request_id": answer["request_id"]}
    assert run.serve.feedback is not None
    counts = collect(run.serve.feedback, [pair.find(run.run_uri, 0)], str(tmp_path / "log"))
    assert (counts["sessions"], counts["clicked"], counts["unanswered"]) == (len(log), len(log), 0)
    table = storage.read_table(str(tmp_path / "log/sessions"))
    theirs = {f"told-{row['session_id']}": row for row in log.to_pylist()}
    for row in table.to_pylist():
        its = theirs[row["session_id"]]
        assert (row["user_id"], row["ts"], row["history"]) == (its["user_id"], its["ts"], its["history"])
        assert all(row[name] == its[name] for name in model["features"])
        assert sum(row["shown"]) == 3 and [
            row["position"][place] for place, yes in enumerate(row["clicks"]) if yes
        ] == [1]


def test_another_driver_is_refused_and_the_service_goes_on(
    address: str, run: Config, log: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_own", set())
    with pytest.raises(ConfigError, match="this cluster serves already"):
        app.run(run)
    assert call(f"{address}/v1/rank", bodies(run, log.slice(0, 1), "null")[0] | {"request_id": None})["intents"]


def test_what_is_not_there_cannot_be_served(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: .* holds no run; `rgalign loop` makes one"):
        pair.find(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^serve.round: .* has no whole rankers_1; `rgalign loop` makes it"):
        pair.find(run.run_uri, 1)
