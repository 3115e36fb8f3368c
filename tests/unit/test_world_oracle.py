from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.world import clicks, kb
from rgalign_ray.world.generate import Shop, generate
from rgalign_ray.world.oracle import Oracle
from rgalign_ray.world.parameters import PARAMETERS


def training_words(users: list[str], ts: np.ndarray) -> np.ndarray:
    return np.zeros(len(users), dtype=int)


@pytest.fixture(scope="module")
def shop():
    return Shop(config.World(sessions=400, users=200, days=2, seed=9)).make(0, 0, 200, training_words)


@pytest.mark.parametrize("model", sorted(clicks.MODELS))
def test_logged_clicks_and_resolutions_have_the_expected_rates(model):
    world = config.World(sessions=8000, users=6000, days=2, seed=9, clicks=model)
    table, truth, clicked = Shop(world).make(0, 0, 4000, training_words)
    position, resolved = (
        np.array(table[n].combine_chunks().flatten()).reshape(4000, -1) for n in ("position", "resolved")
    )
    ranked = np.argsort(np.where(position < 0, 99, position), axis=1, kind="stable")[:, :3]
    ctr, resolution = Oracle(truth).expected(table["session_id"].to_pylist(), ranked)
    within = 3.5 * np.sqrt(0.25 / len(table))
    assert clicked / len(table) == pytest.approx(ctr.mean(), abs=within)
    assert resolved.any(axis=1).mean() == pytest.approx(resolution.mean(), abs=within)


def test_expectations_follow_the_model_that_made_the_log(shop):
    other = config.World(sessions=400, users=200, days=2, seed=9, clicks="cascade")
    truth = Shop(other).make(0, 0, 200, training_words)[1]
    ids = truth["session_id"].to_pylist()
    oracles = {"position": Oracle(shop[1]), "cascade": Oracle(truth)}
    need = np.array([kb.index()[name] for name in oracles["cascade"].needs(ids)])
    for name, oracle in oracles.items():
        assert oracle.click_model == name
        ranked = oracle.best(ids, 3)
        expected = clicks.MODELS[name].expected(need, truth["b_user"].to_numpy(), ranked)
        assert np.array_equal(oracle.ceiling(ids, 3), expected)
    assert np.all(oracles["position"].ceiling(ids, 3)[0] != oracles["cascade"].ceiling(ids, 3)[0])


def test_a_truth_that_does_not_say_by_which_model_people_clicked_is_refused(shop):
    truth = shop[1]
    place = truth.column_names.index("click_model")
    with pytest.raises(DataError, match="'click_model' is missing"):
        Oracle(truth.remove_column(place))

    def of(names: list[str]) -> pa.Table:
        return truth.slice(0, len(names)).set_column(place, "click_model", pa.array(names))

    with pytest.raises(DataError, match="2 click models"):
        Oracle(of(["position", "cascade"]))
    with pytest.raises(DataError, match="'dwell' is not one of"):
        Oracle(of(["dwell"]))
    with pytest.raises(DataError, match="need 'fly_to_the_moon'"):
        Oracle(truth.slice(0, 1).set_column(1, "need", pa.array(["fly_to_the_moon"])))


def test_it_knows_which_slates_were_uniform(shop):
    table, truth, _ = shop
    ids = table["session_id"].to_pylist()
    assert Oracle(truth).uniform(ids).tolist() == table["uniform_slate"].to_pylist()
    assert Oracle(truth).uniform(ids[::-1]).tolist() == table["uniform_slate"].to_pylist()[::-1]
    assert 0 < Oracle(truth).uniform(ids).sum() < 30


@pytest.mark.parametrize("model", sorted(clicks.MODELS))
def test_the_ceiling_ranks_the_need_first_and_is_not_beaten_in_resolution(model):
    world = config.World(sessions=400, users=200, days=2, seed=9, clicks=model)
    truth = Shop(world).make(0, 0, 200, training_words)[1]
    ids, oracle = truth["session_id"].to_pylist(), Oracle(truth)
    names = list(kb.index())
    assert [names[i] for i in oracle.best(ids, 3)[:, 0]] == oracle.needs(ids) == truth["need"].to_pylist()
    ceiling = oracle.ceiling(ids, 3)[1]
    rng = np.random.default_rng(1)
    for _ in range(5):
        ranked = np.argsort(rng.random((len(ids), len(names))), axis=1)[:, :3]
        assert np.all(oracle.expected(ids, ranked)[1] <= ceiling + 1e-12)


def test_clickbait_draws_clicks_and_resolves_nothing_more(shop):
    truth = shop[1]
    oracle, ids = Oracle(truth), truth["session_id"].to_pylist()
    need = np.array([kb.index()[name] for name in oracle.needs(ids)])
    bait, plain = kb.index()["start_selling"], kb.index()["request_invoice"]
    far = (kb.relevance()[need, bait] == 0) & (kb.relevance()[need, plain] == 0)
    ids = [name for name, kept in zip(ids, far, strict=True) if kept]
    baited, honest = (oracle.expected(ids, np.full((len(ids), 1), intent)) for intent in (bait, plain))
    assert np.all(baited[0] > 1.5 * honest[0])
    assert baited[1] == pytest.approx(PARAMETERS.resolution[0] * baited[0])


def test_it_reads_the_truth_of_a_log_and_refuses_others(tmp_path):
    with pytest.raises(DataError, match="truth"):
        Oracle.load(str(tmp_path))
    generate(config.World(sessions=40, users=30, days=2), str(tmp_path), wording_of=training_words, test_days=1)
    oracle = Oracle.load(str(tmp_path))
    with pytest.raises(DataError, match="'nobody'"):
        oracle.needs(["nobody"])
