"""Both click models: what they draw is what they expect, and what holds for any sensible user."""

from __future__ import annotations

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.world import clicks, kb
from rgalign_ray.world.draws import Draws
from rgalign_ray.world.generate import Shop
from rgalign_ray.world.parameters import PARAMETERS

SIZE = len(kb.entries())
MODELS = sorted(clicks.MODELS)
REPETITIONS = 40_000


def training_words(users: list[str], ts: np.ndarray) -> np.ndarray:
    return np.zeros(len(users), dtype=int)


def slates(count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Needs, biases and slates, the need itself and its duplicates in some of them."""
    rng = np.random.default_rng(0)
    need, bias = rng.integers(SIZE, size=count), PARAMETERS.user_spread * rng.normal(size=count)
    tilt = rng.random((count, SIZE)) - kb.relevance()[need] * rng.choice([0.0, 0.5, 1.0], size=(count, 1))
    ranked = tilt.argsort(axis=1)[:, :size]
    return need, bias, rng.permuted(ranked, axis=1)


def outcome(model: str, need: int, bias: float, slate: np.ndarray, rng: np.random.Generator) -> tuple[bool, bool]:
    """One user, in words: did she click at all, and was the need resolved?"""
    p, helps = PARAMETERS, dict(zip((0.0, 0.5, 1.0), PARAMETERS.resolution, strict=True))
    clicked = resolved = False
    for position, intent in enumerate(slate):
        relevance = kb.relevance()[need, intent]
        logit = p.click_bias + bias + p.relevance_slope * relevance + p.bait * kb.entries()[intent].clickbait
        seen = 1 / (1 + p.examination_decay * position) if model == "position" else 1.0
        click = rng.random() < min(seen / (1 + np.exp(-logit)) + p.click_floor, 1.0)
        solves = click and rng.random() < helps[relevance]
        clicked, resolved = clicked or click, resolved or solves
        goes_on = p.goes_on_after_click if click else p.goes_on_after_skip
        if model == "cascade" and (solves or rng.random() > goes_on):
            break
    return clicked, resolved


@pytest.mark.parametrize("model", MODELS)
def test_expectations_agree_with_users_simulated_one_by_one(model):
    need, bias, ranked = slates(6, 3)
    rng, users = np.random.default_rng(1), 8000
    for row, expected in enumerate(zip(*clicks.MODELS[model].expected(need, bias, ranked), strict=True)):
        found = np.mean([outcome(model, need[row], bias[row], ranked[row], rng) for _ in range(users)], axis=0)
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / users)


@pytest.mark.parametrize("model", MODELS)
def test_draws_have_the_expected_rates(model):
    need, bias, ranked = slates(8, 3)
    expected = np.stack(clicks.MODELS[model].expected(need, bias, ranked), axis=1)
    session = np.arange(8 * REPETITIONS, dtype=np.uint64)
    repeated = (np.repeat(values, REPETITIONS, axis=0) for values in (need, bias, ranked))
    drawn = clicks.MODELS[model].draw(Draws(0), session, *repeated)
    found = np.stack([part.any(axis=1).reshape(8, REPETITIONS).mean(axis=1) for part in drawn], axis=1)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / REPETITIONS)
    count = drawn[0].sum(axis=1).reshape(8, REPETITIONS).mean(axis=1)
    assert count == pytest.approx(
        clicks.MODELS[model].expected_clicks(need, bias, ranked), abs=4 * np.sqrt(0.75 / REPETITIONS)
    )
    assert expected.min() < 0.1 and expected.max() > 0.7  # slates with and without the need


def test_nobody_reads_on_once_the_need_is_resolved():
    need, bias, ranked = slates(20_000, 3)
    clicked, resolved = clicks.MODELS["cascade"].draw(Draws(0), np.arange(20_000, dtype=np.uint64), need, bias, ranked)
    assert not np.any(resolved & ~clicked)
    assert resolved.sum(axis=1).max() == 1
    for position in range(2):
        assert not clicked[resolved[:, position], position + 1 :].any()
    assert np.any(clicked.sum(axis=1) > 1)  # a click that does not resolve need not be the last


def test_the_models_agree_at_the_first_position():
    need, bias, ranked = slates(500, 1)
    first, second = (np.stack(clicks.MODELS[model].expected(need, bias, ranked)) for model in MODELS)
    assert np.abs(first - second).max() < 1e-15
    longer = [np.stack(clicks.MODELS[model].expected(*slates(500, 2))) for model in MODELS]
    assert np.abs(longer[0] - longer[1]).max() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_a_more_relevant_intent_in_a_place_is_never_worse(model):
    need, bias, ranked = slates(10_000, 3)
    before = np.stack(clicks.MODELS[model].expected(need, bias, ranked))
    near = (kb.relevance()[need] == kb.NEAR).argmax(axis=1)
    for better in (near, need):
        for position in range(3):
            worse, changed = ranked[:, position], ranked.copy()
            changed[:, position] = better
            gains = kb.relevance()[need, better] > kb.relevance()[need, worse]
            gains &= ~np.any(ranked == better[:, None], axis=1) & ~kb.clickbait()[worse]
            ctr, resolution = np.stack(clicks.MODELS[model].expected(need, bias, changed)) - before
            assert gains.sum() > 1000
            assert np.all(resolution[gains] > 0) and np.all(ctr[gains] >= 0)  # a click may be certain already
            assert np.mean(ctr[gains] > 0) > 0.99


@pytest.mark.parametrize("model", MODELS)
def test_a_longer_slate_is_never_worse(model):
    need, bias, ranked = slates(500, 5)
    expected = [np.stack(clicks.MODELS[model].expected(need, bias, ranked[:, :k])) for k in range(1, 6)]
    assert np.all(np.diff(expected, axis=0) >= 0) and np.all(expected[-1] <= 1)


def test_worlds_differ_in_clicks_alone():
    worlds = (config.World(sessions=3000, users=900, days=2, seed=6, clicks=model) for model in MODELS)
    tables = [Shop(world).make(0, 0, 1400, training_words)[:2] for world in worlds]
    same = [name for name in tables[0][0].column_names if name not in ("clicks", "resolved")]
    assert tables[0][0].select(same).equals(tables[1][0].select(same))
    assert not tables[0][0]["clicks"].equals(tables[1][0]["clicks"])
    assert [truth["click_model"].unique().to_pylist() for _, truth in tables] == [[model] for model in MODELS]
