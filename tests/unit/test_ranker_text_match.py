"""What texts say before a click was seen, and how much a ranker begins to believe it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranker_data import rows, sizes

from rgalign_ray import config
from rgalign_ray.metrics import group_auc
from rgalign_ray.ranker.batches import score_rows
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.rows import ragged
from rgalign_ray.ranker.text_match import MAX_WEIGHT, TextMatch, near
from rgalign_ray.ranker.whitening import Moments

SIZES = sizes(item_dim=6, match_dim=23)
NONE = Moments.of(np.zeros((0, SIZES.embedding_dim)))
SETTINGS = config.Ranker(dim=16, heads=2, epochs=4, batch_sessions=32, whitened_dim=12)


def _texts(seed: int = 0) -> np.ndarray:
    return 4 + np.random.default_rng(seed).normal(size=(SIZES.num_intents, SIZES.embedding_dim))


def _fitted(sessions: np.ndarray, queries: np.ndarray | None = None) -> TextMatch:
    match = TextMatch(SIZES, SIZES.match_dim)
    match.fit(_texts(), Moments.of(sessions), NONE if queries is None else Moments.of(queries))
    return match


@pytest.mark.parametrize("weight", [0.0, 3.0, 9.0])
def test_the_weight_begins_where_it_makes_the_clicks_likeliest(weight: float) -> None:
    draw = np.random.default_rng(1)
    sessions, n = draw.normal(size=(4000, SIZES.embedding_dim)) - 2, 4000
    match = _fitted(sessions)
    embedding, everyone = torch.from_numpy(sessions).float(), torch.arange(SIZES.num_intents).expand(n, -1)
    prior = torch.from_numpy(draw.normal(size=SIZES.num_intents)).float().expand(n, -1)
    with torch.no_grad():
        match.gate.fill_(weight / 10)
        logits = prior + near(match(embedding, torch.zeros(n, dtype=torch.bool)), match.texts[everyone])
        clicked = torch.distributions.Categorical(logits=logits)
        torch.manual_seed(0)
        target = torch.nn.functional.one_hot(clicked.sample(), SIZES.num_intents).double()
    match.fit_weight(embedding, prior, everyone, target, Group())
    assert match.weight.item() == pytest.approx(weight, abs=0.4)


def test_a_match_that_speaks_against_the_clicks_is_not_believed_and_one_that_tells_them_all_is_bounded() -> None:
    sessions = _texts()
    match, everyone = _fitted(sessions), torch.arange(SIZES.num_intents).expand(SIZES.num_intents, -1)
    embedding, even, own = torch.from_numpy(sessions), torch.zeros(everyone.shape), torch.eye(SIZES.num_intents)
    match.fit_weight(embedding, even, everyone, (1 - own) / (SIZES.num_intents - 1), Group())
    assert match.weight.item() == pytest.approx(0, abs=1e-3)
    match.fit_weight(embedding, even, everyone, own, Group())
    assert match.weight.item() == pytest.approx(MAX_WEIGHT, abs=1e-3)


@pytest.mark.parametrize("told", [0.2, 0.5, 0.9])
def test_texts_that_are_the_needs_own_are_believed_as_far_as_clicks_follow_the_need(told: float) -> None:
    """Of two texts that say the opposite, softmax(±κ) is `told` on the need's own: 2κ = log(told / (1 − told))."""
    texts = np.stack([np.eye(SIZES.embedding_dim)[0], -np.eye(SIZES.embedding_dim)[0]])
    match = TextMatch(sizes(intents=2, match_dim=1), 1)
    match.fit(texts, Moments.of(texts), NONE)
    target = torch.tensor([[told, 1 - told], [1 - told, told]])
    match.fit_weight(torch.from_numpy(texts), torch.zeros(2, 2), torch.tensor([[0, 1], [0, 1]]), target, Group())
    assert match.weight.item() == pytest.approx(max(np.log(told / (1 - told)) / 2, 0), abs=2e-3)


def test_a_text_among_many_that_is_the_needs_own_is_believed() -> None:
    """Where the others' texts have nothing to do with it, κ makes its share what clicks make it."""
    n, of_need = SIZES.num_intents, 0.4
    match, everyone = _fitted(_texts()), torch.arange(n).expand(n, -1)
    target = torch.full((n, n), (1 - of_need) / (n - 1)).fill_diagonal_(of_need)
    match.fit_weight(torch.from_numpy(_texts()), torch.zeros(n, n), everyone, target, Group())
    assert match.weight.item() == pytest.approx(np.log(of_need / (1 - of_need) * (n - 1)), abs=1)


def test_what_all_written_queries_share_is_no_match() -> None:
    draw = np.random.default_rng(2)
    sessions = draw.normal(size=(200, SIZES.embedding_dim))
    shared = 30 * draw.normal(size=SIZES.embedding_dim)
    match = _fitted(sessions, sessions + shared)
    with torch.no_grad():
        match.gate.fill_(1.0)
    told, nobody = (torch.from_numpy(x[:20]).float() for x in (sessions, sessions + shared)), torch.zeros(20).bool()
    read = [match(x, nobody) for x in told]
    torch.testing.assert_close(read[0], read[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["qe_rec", "din_sentence"])
def test_intents_that_nobody_has_clicked_are_found_by_their_text(kind: str) -> None:
    texts = _texts()
    learned = _sessions(texts, range(12), 600, seed=0)
    other = _sessions(texts, range(12, SIZES.num_intents), 300, seed=1)
    found = {}
    for text_match in (True, False):
        settings = SETTINGS.changed({"text_match": text_match})
        fit = Fit(kind, SIZES, settings, learned, texts, seed=0, group=Group())
        figures = fit.run()
        assert ("text_match" in figures) == text_match
        scores = score_rows(fit.model, other, "prompt")
        found[text_match] = (scores.argmax(axis=1) == other["clicks"].argmax(axis=1)).mean()
    assert found[True] > 0.8 > 0.3 > found[False]


def _sessions(texts: np.ndarray, needs: range, n: int, seed: int, noise: float = 0.5) -> dict:
    """Sessions whose embedding is the needed intent's text at another length, with noise; all intents were shown."""
    draw = np.random.default_rng(seed)
    data, need = rows(SIZES, n, seed=seed), draw.choice(list(needs), size=n)
    told = 2 * (texts[need] + noise * draw.normal(size=(n, SIZES.embedding_dim)))
    clicks = data["candidates"] == need[:, None]
    return data | {"prompt": told.astype(np.float16), "clicks": clicks, "shown": np.ones_like(clicks)}


def test_a_log_whose_clicks_have_no_text_begins_without_a_match() -> None:
    data = rows(SIZES, 100)
    data["has_prompt"] &= ~data["clicks"].any(axis=1)
    assert Fit("qe_rec", SIZES, SETTINGS, data, _texts(), seed=0, group=Group()).model.match.weight.item() < 1e-3


@pytest.mark.parametrize("weight", [0.2, 0.6, 1.5])
def test_towers_weigh_beside_the_match_what_clicks_among_the_shown_say(weight: float) -> None:
    draw = np.random.default_rng(3)
    data = _sessions(_texts(), range(SIZES.num_intents), 3000, seed=4)
    data["shown"] = draw.permuted(np.arange(SIZES.num_intents) < 4 * np.ones((3000, 1)), axis=1)
    data["clicks"], data["valid"] = data["shown"].copy(), np.arange(3000) >= 100
    fit = Fit("qe_rec", SIZES, SETTINGS, data, _texts(), seed=0, group=Group())
    with torch.no_grad():
        fit.model.prior.copy_(torch.from_numpy(3 * draw.normal(size=SIZES.num_intents)))
        fit.model.match.gate.fill_(0.4)
        fit.model.shown_weight.fill_(weight)
    fit.model.rank()
    log_odds = torch.from_numpy(score_rows(fit.model, data, "prompt")).masked_fill(
        ~torch.from_numpy(data["shown"]), -torch.inf
    )
    torch.manual_seed(0)
    clicked = torch.distributions.Categorical(logits=log_odds).sample()
    data["clicks"] = data["candidates"] == data["candidates"][np.arange(3000), clicked][:, None]
    fit.model.tower_weight = 1.0
    fit.valid = ragged({name: values[data["valid"]] for name, values in data.items()})
    fit._weigh_among_shown(fit.model, fit.model.match)
    assert fit.model.shown_weight.item() == pytest.approx(weight, abs=0.08)
    assert fit.model.match.weight.item() == 4


def test_towers_that_imitate_who_chose_the_slates_weigh_less_where_intents_are_ranked() -> None:
    """An old ranker shows what a field says, which has nothing to do with the need; of that, the need is clicked."""
    learned, other = (_slates_of_an_old_ranker(n, seed) for n, seed in ((2500, 0), (400, 1)))
    fit = Fit("qe_rec", SIZES, SETTINGS, learned, _texts(), seed=0, group=Group())
    figures = fit.run()
    assert figures["shown_weight"] == fit.model.shown_weight.item() < 0.5
    clicks, shown, counts = fit.valid["clicks"].values, fit.valid["shown"].values, fit.valid["clicks"].counts
    right, aucs = [], []
    for _ in range(2):
        scores = score_rows(fit.model, fit.valid, "prompt")
        found = group_auc(scores[shown], clicks[shown], np.repeat(np.arange(len(counts)), counts)[shown])
        aucs.append(np.average(found.auc, weights=found.weight))
        best = score_rows(fit.model, other, "prompt").argmax(axis=1)
        right.append((best == other["need"]).mean())
        fit.model.rank()
    assert right[1] > right[0] + 0.2
    assert figures["gauc_shown"] == pytest.approx(aucs[1]) and aucs[1] > aucs[0] + 0.01


def _slates_of_an_old_ranker(n: int, seed: int) -> dict:
    """Sessions with the need's place among the candidates; where it was not shown, any of the shown was clicked."""
    data, draw = _sessions(_texts(), range(SIZES.num_intents), n, seed, noise=2.0), np.random.default_rng(seed)
    taste, needed = draw.integers(4, size=n), data["clicks"]
    data["fields"][:, 0] = taste
    shown = draw.random(needed.shape) < np.where(data["candidates"] % 4 == taste[:, None], 0.6, 0.1)
    shown[:, 0] |= ~shown.any(axis=1)
    clicked = ((10 * needed + draw.random(shown.shape)) * shown).argmax(axis=1)
    clicks = np.arange(SIZES.num_intents) == clicked[:, None]
    return data | {"shown": shown, "clicks": clicks, "need": needed.argmax(axis=1)}
