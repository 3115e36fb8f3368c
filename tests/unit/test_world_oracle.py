from __future__ import annotations

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.world import kb
from rgalign_ray.world.generate import Shop, generate
from rgalign_ray.world.oracle import Oracle
from rgalign_ray.world.parameters import PARAMETERS


def training_words(users: list[str], ts: np.ndarray) -> np.ndarray:
    return np.zeros(len(users), dtype=int)


@pytest.fixture(scope="module")
def shop():
    return Shop(config.World(sessions=400, users=200, days=2, seed=9)).make(0, 0, 200, training_words)


def simulate(need: int, bias: float, ranked: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Shares of `draws` users who click at all, and who click something that resolves, one position at a time."""
    p = PARAMETERS
    clicked, resolved = np.zeros(draws, bool), np.zeros(draws, bool)
    for position, intent in enumerate(ranked):
        relevance = kb.relevance()[need, intent]
        logit = p.click_bias + bias + p.relevance_slope * relevance + p.bait * kb.entries()[intent].clickbait
        looks = rng.random(draws) < 1 / (1 + p.examination_decay * position)
        likes = rng.random(draws) < 1 / (1 + np.exp(-logit))
        slips = rng.random(draws) < p.click_floor / (
            1 - 1 / (1 + p.examination_decay * position) / (1 + np.exp(-logit))
        )
        click = (looks & likes) | slips
        clicked |= click
        resolved |= click & (rng.random(draws) < dict(zip((0.0, 0.5, 1.0), p.resolution, strict=True))[relevance])
    return clicked.mean(), resolved.mean()


def test_expectations_agree_with_a_simulation_of_the_click_model(shop):
    truth = shop[1]
    ids, rng = truth["session_id"].to_pylist()[:6], np.random.default_rng(0)
    oracle = Oracle(truth)
    best = oracle.best(ids, 3)
    ranked = np.where(np.arange(6)[:, None] % 2 == 0, best, rng.integers(0, len(kb.entries()), (6, 3)))
    ctr, resolution = oracle.expected(ids, ranked)
    for row, need in enumerate(oracle.needs(ids)):
        bias = truth["b_user"][row].as_py()
        found = simulate(kb.index()[need], bias, ranked[row], 40_000, rng)
        assert found == pytest.approx((ctr[row], resolution[row]), abs=0.012)


def test_logged_clicks_have_the_expected_rate():
    table, truth, clicked = Shop(config.World(sessions=8000, users=6000, days=2, seed=9)).make(
        0, 0, 4000, training_words
    )
    position = np.array(table["position"].combine_chunks().flatten()).reshape(len(table), -1)
    ranked = np.argsort(np.where(position < 0, 99, position), axis=1, kind="stable")[:, :3]
    ctr, _ = Oracle(truth).expected(table["session_id"].to_pylist(), ranked)
    assert clicked / len(table) == pytest.approx(ctr.mean(), abs=3.5 * np.sqrt(0.25 / len(table)))


def test_the_ceiling_ranks_the_need_first_and_is_not_beaten_in_resolution(shop):
    truth = shop[1]
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
