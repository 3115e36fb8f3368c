"""Rankers side by side: what the metrics say of known rankers, what controls read, and which sessions are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from rgalign_ray import config, metrics, schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.examples import example_sessions
from rgalign_ray.evaluate.ladder import Rung, TestSessions, compare, table_rows
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.base import Ranker
from rgalign_ray.ranker.baselines.two_tower import TwoTower
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.rollout.worker import vectors_table
from rgalign_ray.world.generate import generate

DIM = 12
SETTINGS = config.Evaluate(k=3, bootstrap=100)


def training_words(users: list[str], ts: np.ndarray) -> np.ndarray:
    return np.zeros(len(users), dtype=int)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little log of the shop, every fourth session of which has role rank; rankers and embeddings of it."""
    root = tmp_path_factory.mktemp("ladder")
    generate(config.World(sessions=400, users=150, days=2, seed=3), str(root / "log"), wording_of=training_words)
    for uri in storage.list_files(str(root / "log/sessions")):
        table = storage.read_table(uri)
        roles = ["rank" if key % 4 == 0 else "test" for key in session_keys(table["session_id"].to_pylist())]
        storage.write_table(uri, table.append_column("role", pa.array(roles)))
    whole = storage.read_table(str(root / "log/sessions"))
    ids = whole["session_id"].to_pylist()
    vectors = np.random.default_rng(0).normal(size=(2 * len(ids), DIM)).astype(np.float16)
    readouts = ["prompt"] * len(ids) + ["query"] * len(ids)
    samples = [-1] * len(ids) + [0] * len(ids)
    table = vectors_table(ids * 2, readouts, samples, [None] * (2 * len(ids)), vectors, "r0")
    storage.write_table(str(root / "embeddings/a.parquet"), table)
    spec = FeatureSpec.model_validate({"fields": [{"name": "order_tab", "kind": "categorical"}], "min_count": 1})
    space = FeatureSpace.fit(spec, [whole])
    intents = sorted(storage.read_table(str(root / "log/intents.parquet"))["intent_id"].to_pylist())
    for name, kind in (("qe_rec", QERec), ("two_tower", TwoTower)):
        _save(root / name, kind, space, intents)
    return root


def _save(place: Path, kind: type[Ranker], space: FeatureSpace, intents: list[str]) -> None:
    torch.manual_seed(0)
    sizes = Sizes.of(space, num_intents=len(intents), embedding_dim=DIM if kind.reads_queries else 0, item_dim=0)
    model = kind(sizes, config.Ranker(dim=8, heads=2, whitened_dim=8))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.4)
    meta = scoring.meta_of(model, space=space.to_dict(), intent_ids=intents, reasoner_version="r0", seed=0, figures={})
    scoring.save(model, str(place), meta)


@pytest.fixture(scope="module")
def sessions(place: Path) -> TestSessions:
    return TestSessions(str(place / "log"), str(place / "log"), SETTINGS)


def rung(place: Path, name: str = "qe_rec", **changes: object) -> Rung:
    return Rung(name, str(place / name), **({"embeddings": str(place / "embeddings")} | changes))  # type: ignore[arg-type]


def mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))


def test_only_sessions_of_role_test_count_in_the_order_of_their_ids(sessions: TestSessions, place: Path) -> None:
    whole = storage.read_table(str(place / "log/sessions")).to_pylist()
    expected = sorted((row for row in whole if row["role"] == "test"), key=lambda row: row["session_id"])
    assert 0 < len(expected) < len(whole)
    assert sessions.ids == [row["session_id"] for row in expected]
    assert sessions.users == [row["user_id"] for row in expected]
    assert sessions.clicks.sum(axis=1).tolist() == [sum(row["clicks"]) for row in expected]


def test_a_ranker_that_knows_the_clicks_is_perfect_and_a_constant_one_is_chance(sessions: TestSessions) -> None:
    clicked = sessions.clicks.any(axis=1)
    assert 0 < clicked.sum() < len(clicked)
    knows, constant, wrong = (
        sessions.judge(scores) for scores in (sessions.clicks * 1.0, sessions.clicks * 0.0, sessions.clicks * -1.0)
    )
    for judged, auc in ((knows, 1.0), (constant, 0.5), (wrong, 0.0)):
        np.testing.assert_array_equal(judged.values["GAUC"][clicked], auc)
        assert np.isnan(judged.values["GAUC"][~clicked]).all(), "no click, no AUC"
    few = clicked & (sessions.clicks.sum(axis=1) <= 3)
    np.testing.assert_allclose(knows.values["Recall@3"][few], 1.0)
    np.testing.assert_allclose(knows.values["NDCG@3"][few], 1.0)
    assert mean(wrong.values["NDCG@3"]) == 0.0
    assert (knows.weights["GAUC"] == sessions.mask.sum(axis=1)).all()


def test_a_ranker_that_knows_the_need_is_the_best_in_truth(sessions: TestSessions) -> None:
    needs = sessions.needs()
    assert needs is not None
    assert (needs.sum(axis=1) == 1).all()
    random = np.random.default_rng(0).random(needs.shape)
    knows, guesses = sessions.judge(needs + 0.01 * random), sessions.judge(random)
    np.testing.assert_array_equal(knows.values["need Recall@3"], 1.0)
    assert mean(guesses.values["need Recall@3"]) < 0.3
    assert sessions.oracle is not None
    ceiling = sessions.oracle.ceiling(sessions.ids, 3)
    for metric, best in zip(("true CTR@3", "resolved@3"), ceiling, strict=True):
        assert mean(guesses.values[metric]) < mean(knows.values[metric]) <= mean(best) + 1e-9


def test_uniform_slates_are_judged_by_themselves(sessions: TestSessions, place: Path) -> None:
    table = storage.read_table(str(place / "log/sessions")).sort_by("session_id")
    uniform = table.filter(pc.field("role") == "test")["uniform_slate"].to_numpy()
    counted = uniform & sessions.clicks.any(axis=1)
    assert 0 < counted.sum() < uniform.sum()
    judged = sessions.judge(np.random.default_rng(0).random(sessions.mask.shape))
    np.testing.assert_array_equal(judged.values["GAUC uniform"][counted], judged.values["GAUC"][counted])
    assert np.isnan(judged.values["GAUC uniform"][~counted]).all()
    assert (judged.weights["GAUC uniform"] == judged.weights["GAUC"]).all()


def test_gauc_among_the_shown_knows_nothing_of_the_rest(sessions: TestSessions) -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(size=sessions.mask.shape)
    elsewhere = np.where(sessions.shown, scores, draw.normal(size=scores.shape))
    found, other = sessions.judge(scores), sessions.judge(elsewhere)
    np.testing.assert_array_equal(found.values["GAUC shown"], other.values["GAUC shown"])
    assert np.nansum(found.values["GAUC"] != other.values["GAUC"]) > 0
    clicked, shown = sessions.clicks.sum(axis=1), sessions.shown.sum(axis=1)
    counted = ~np.isnan(found.values["GAUC shown"])
    np.testing.assert_array_equal(counted, (clicked > 0) & (clicked < shown))
    np.testing.assert_array_equal(found.weights["GAUC shown"], shown)
    right = sessions.judge(sessions.clicks.astype(float)).values["GAUC shown"]
    assert (right[counted] == 1).all()


def test_without_a_truth_there_is_nothing_to_say_of_needs(place: Path) -> None:
    sessions = TestSessions(str(place / "log"), None, SETTINGS)
    assert sessions.needs() is None
    assert set(sessions.judge(sessions.clicks * 1.0).values) == {"GAUC", "GAUC shown", "Recall@3", "NDCG@3"}


def test_the_first_k_are_the_best_and_equal_ones_stand_by_intent(sessions: TestSessions) -> None:
    scores = np.random.default_rng(1).integers(0, 4, sessions.candidates.shape)
    for row, top in enumerate(sessions.top(scores, 3)):
        pairs = sorted(zip(-scores[row], sessions.candidates[row], strict=True))
        assert top.tolist() == [intent for _, intent in pairs[:3]]


def test_two_candidates_have_no_third_title(sessions: TestSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = sessions.candidates.copy()
    candidates[0, 2:] = -1
    monkeypatch.setattr(sessions, "candidates", candidates)
    names = sessions.catalogue.titles
    first, second, *_ = sessions.titles(-np.arange(candidates.shape[1]) * np.ones(candidates.shape), 3)
    assert first == [names[intent] for intent in candidates[0, :2]]
    assert second == [names[intent] for intent in candidates[1, :3]]


def test_a_ranker_of_the_ladder_scores_as_it_does_alone(sessions: TestSessions, place: Path) -> None:
    embeddings = Embeddings.load(str(place / "embeddings"))
    alone = {}
    for rank_by in ("log", "click"):
        ranker = scoring.load(str(place / "qe_rec"), rank_by)
        batch = examples(sessions.table, ranker.space, sessions.catalogue)
        options = {"space_version": ranker.meta.space_version}
        alone[rank_by] = scoring.score_sessions(ranker, batch, embeddings=embeddings, **options)
        np.testing.assert_allclose(sessions.score(rung(place), rank_by), alone[rank_by], atol=1e-5)
    own = sessions.score(rung(place))
    assert own.shape == sessions.candidates.shape
    np.testing.assert_allclose(own, alone["click"], atol=1e-5)
    np.testing.assert_allclose(alone["click"], alone["log"] * float(ranker.model.shown_weight), atol=1e-5)
    assert np.abs(own - alone["log"]).max() > 1e-2
    null = sessions.score(rung(place, embeddings=None))
    np.testing.assert_allclose(null, scoring.score_sessions(ranker, batch, **options), atol=1e-5)
    assert np.abs(own - null).max() > 1e-2


def test_each_control_reads_something_else(sessions: TestSessions, place: Path) -> None:
    found = {query: sessions.score(rung(place, query=query)) for query in ("own", "shuffled", "mean")}
    found["null"] = sessions.score(rung(place, embeddings=None))
    found["prior"] = sessions.score(rung(place, prior=True))
    assert len({scores.tobytes() for scores in found.values()}) == len(found)
    prior = scoring.load(str(place / "qe_rec")).model.prior.numpy()
    np.testing.assert_array_equal(found["prior"], prior[sessions.candidates])
    np.testing.assert_array_equal(sessions.score(rung(place, query="shuffled")), found["shuffled"])


def test_a_baseline_without_queries_hears_no_embedding(sessions: TestSessions, place: Path) -> None:
    expected = sessions.score(rung(place, "two_tower", embeddings=None))
    for query in ("shuffled", "mean"):
        np.testing.assert_array_equal(sessions.score(rung(place, "two_tower", embeddings=None, query=query)), expected)


def test_a_query_tower_that_says_the_same_of_all_has_no_variance(
    sessions: TestSessions, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = sessions.between_session_variance(rung(place))
    assert 0.0 < share <= 1.0
    assert sessions.between_session_variance(rung(place, query="shuffled")) == pytest.approx(share, rel=0.2)
    assert sessions.between_session_variance(rung(place, embeddings=None)) == pytest.approx(0.0, abs=1e-9)
    monkeypatch.setattr(
        QERec, "parted", lambda _, z: z.split([2, 1], dim=-1)
    )  # the match of texts is none of the tower
    monkeypatch.setattr(TestSessions, "_queries", lambda *_: torch.tensor([[1.0, 3.0, 90.0], [3.0, 3.0, -90.0]]))
    assert sessions.between_session_variance(rung(place)) == pytest.approx(1.0 / (5 + 9))
    monkeypatch.setattr(TestSessions, "_queries", lambda *_: torch.zeros(4, 3))
    assert sessions.between_session_variance(rung(place)) == 0.0


def test_embeddings_of_another_reasoner_are_refused(sessions: TestSessions, place: Path, tmp_path: Path) -> None:
    vectors = np.ones((1, DIM), np.float16)
    storage.write_table(str(tmp_path / "a.parquet"), vectors_table(["s"], ["prompt"], [-1], [None], vectors, "r1"))
    with pytest.raises(DataError, match="reasoner 'r1'"):
        sessions.score(rung(place, embeddings=str(tmp_path)))


def test_rows_hold_the_mean_of_each_metric_and_an_interval_around_it(sessions: TestSessions) -> None:
    random = np.random.default_rng(2).random(sessions.candidates.shape)
    rungs = [Rung("knows", ""), Rung("guesses", "", control=True, note="a coin")]
    judged = [sessions.judge(sessions.clicks + random), sessions.judge(random)]
    first, second = table_rows(rungs, judged, sessions.users, SETTINGS)
    assert (first.name, second.name, second.note, second.control) == ("knows", "guesses", "a coin", True)
    session = np.repeat(np.arange(len(sessions.ids)), sessions.mask.sum(axis=1))
    gauc = metrics.gauc(random[sessions.mask], sessions.clicks[sessions.mask], session)
    assert second.metrics["GAUC"].value == pytest.approx(gauc)
    for metric, estimate in second.metrics.items():
        if metric != "GAUC":
            assert estimate.value == pytest.approx(mean(judged[1].values[metric]))
        assert estimate.low <= estimate.value <= estimate.high
    assert second.metrics["GAUC"].low < gauc < second.metrics["GAUC"].high


def test_a_comparison_is_paired(sessions: TestSessions) -> None:
    random = np.random.default_rng(2).random(sessions.candidates.shape)
    knows, guesses = sessions.judge(sessions.clicks + random), sessions.judge(random)
    same = compare(Rung("a", ""), Rung("b", ""), guesses, guesses, sessions.users, SETTINGS)
    assert [c.metric for c in same] == list(guesses.values)
    assert {(c.better, c.worse, c.separated) for c in same} == {("a", "b", False)}
    assert all(c.difference.value == c.difference.low == c.difference.high == 0.0 for c in same)
    better = {c.metric: c for c in compare(Rung("a", ""), Rung("b", ""), knows, guesses, sessions.users, SETTINGS)}
    assert better["GAUC"].separated and better["GAUC"].difference.low > 0.3
    worse = {c.metric: c for c in compare(Rung("b", ""), Rung("a", ""), guesses, knows, sessions.users, SETTINGS)}
    assert worse["GAUC"].difference.value == pytest.approx(-better["GAUC"].difference.value)


def _log(folder: Path, clicks: list[list[bool]], order: list[int] | None = None) -> str:
    """A log of test sessions t0, t1, … that rank intents b and a, in one file."""
    titles = {"intent_id": ["a", "b"], "title": ["a", "b"], "description": ["", ""], "category": ["", ""]}
    storage.write_table(str(folder / "intents.parquet"), pa.table(titles, schema=schema.INTENTS))
    count = len(clicks)
    table = pa.table(
        {
            "session_id": [f"t{i}" for i in range(count)],
            "user_id": [f"u{i}" for i in range(count)],
            "candidates": [["b", "a"]] * count,
            "shown": [[True, True]] * count,
            "clicks": clicks,
            "role": ["test"] * (count - 1) + ["rank"],
        }
    )
    table = table.take(pa.array(order or range(count)))
    storage.write_table(str(folder / "sessions/dt=2026-01-01/region=SG/part-00000.parquet"), table)
    return str(folder)


@pytest.mark.parametrize("clicks", [[False, False], [True, True]], ids=["no click", "nothing but clicks"])
def test_a_test_period_without_anything_to_judge_by_is_refused(tmp_path: Path, clicks: list[bool]) -> None:
    with pytest.raises(DataError, match="role test: 4 sessions, none with a click to judge by"):
        TestSessions(_log(tmp_path, [clicks] * 5), None, SETTINGS)


def test_examples_are_clicked_test_sessions_in_an_order_of_their_own(tmp_path: Path) -> None:
    clicks = [[i % 3 == 0, i % 5 == 1] for i in range(31)]
    log = _log(tmp_path / "one", clicks)
    shown = example_sessions(log, None, config.Evaluate(examples=100))
    assert sorted(shown) == sorted(f"t{i}" for i in range(30) if any(clicks[i]))
    assert shown != sorted(shown, key=lambda session: int(session[1:]))
    assert example_sessions(log, None, config.Evaluate(examples=4)) == shown[:4]
    assert example_sessions(log, None, config.Evaluate(examples=0)) == []
    again = _log(tmp_path / "two", clicks, order=list(range(31))[::-1])
    assert example_sessions(again, None, config.Evaluate(examples=100)) == shown


@pytest.mark.parametrize(("intent", "column"), [("b", 0), ("a", 1)])
def test_the_first_example_clicked_the_intent_asked_for(tmp_path: Path, intent: str, column: int) -> None:
    clicks = [[i == 7, i > 20 and i != 7] for i in range(31)]
    shown = example_sessions(_log(tmp_path, clicks), None, config.Evaluate(examples=5, first_example=intent))
    assert len(set(shown)) == 5
    assert clicks[int(shown[0][1:])][column]
    plain = example_sessions(str(tmp_path), None, config.Evaluate(examples=100))
    assert [i for i in plain if i != shown[0]][:4] == shown[1:]


def test_an_intent_that_nobody_clicked_leads_nothing(tmp_path: Path) -> None:
    log = _log(tmp_path, [[True, False]] * 9)
    plain = example_sessions(log, None, config.Evaluate(examples=3))
    for intent in ("a", "unknown"):
        assert example_sessions(log, None, config.Evaluate(examples=3, first_example=intent)) == plain


def test_a_session_of_the_true_need_leads_before_one_that_clicked_without(tmp_path: Path) -> None:
    needs = ["cancel_order"] * 20 + ["speed_up_parcel_delivery"] * 11
    truth = {"session_id": [f"t{i}" for i in range(31)], "need": needs, "b_user": [0.0] * 31}
    truth |= {"uniform": [False] * 31, "click_model": ["position"] * 31}
    storage.write_table(str(tmp_path / "truth/part-00000.parquet"), pa.table(truth))
    settings = config.Evaluate(examples=3, first_example="speed_up_parcel_delivery")
    titles = {name: ["speed_up_parcel_delivery", "b"] for name in schema.INTENTS.names}
    log = _log(tmp_path, [[False, i < 20] for i in range(31)])
    storage.write_table(str(tmp_path / "intents.parquet"), pa.table(titles, schema=schema.INTENTS))
    table = storage.read_table(f"{log}/sessions/dt=2026-01-01/region=SG/part-00000.parquet")
    candidates = pa.array([["b", "speed_up_parcel_delivery"]] * 31)
    place = table.column_names.index("candidates")
    storage.write_table(
        f"{log}/sessions/dt=2026-01-01/region=SG/part-00000.parquet", table.set_column(place, "candidates", candidates)
    )
    shown = example_sessions(log, str(tmp_path), settings)
    assert needs[int(shown[0][1:])] == "speed_up_parcel_delivery"
    assert len(set(shown)) == 3


def test_calibration_adds_up_to_the_clicks_and_lies_on_the_diagonal_for_true_shares(sessions: TestSessions) -> None:
    clicked = int(sessions.clicks.any(axis=1).sum())
    draw = np.random.default_rng(0)
    found = sessions.calibration(draw.normal(size=sessions.mask.shape))
    assert sum(found["count"]) == sessions.mask[sessions.clicks.any(axis=1)].sum()
    assert sum(found["expected"]) == pytest.approx(clicked)
    assert sum(found["observed"]) == pytest.approx(clicked)
    with np.errstate(divide="ignore"):
        sure = sessions.calibration(np.log(sessions.clicks / np.maximum(sessions.clicks.sum(axis=1, keepdims=True), 1)))
    assert sure["expected"] == pytest.approx(sure["observed"])
    assert sure["observed"][0] == 0
