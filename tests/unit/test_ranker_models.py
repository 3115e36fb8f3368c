"""Towers, mutual attention, QE-Rec and the two-tower baseline."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_data import rows, sizes

from rgalign_ray import config
from rgalign_ray.ranker.base import Ranker
from rgalign_ray.ranker.baselines.bst import TargetTransformer
from rgalign_ray.ranker.baselines.din import DINSentence
from rgalign_ray.ranker.baselines.sasrec import CausalHistory
from rgalign_ray.ranker.batches import query_input, to_batch
from rgalign_ray.ranker.models import MODELS
from rgalign_ray.ranker.mutual_attention import MutualAttention
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.towers import QueryTower, TargetAttention
from rgalign_ray.ranker.whitening import Moments, Whitening

SIZES = sizes(item_dim=6, match_dim=23)
SETTINGS = config.Ranker(dim=16, heads=4, attention_layers=2, whitened_dim=8)


READING = [kind for kind in MODELS.values() if kind.reads_queries and kind.trained]


def _listening(kind: type[Ranker]) -> Ranker:
    """A ranker whose query tower has opened, and which compares texts."""
    torch.manual_seed(0)
    model = kind(SIZES, SETTINGS).eval()
    with torch.no_grad():
        model.match.gate.fill_(0.5)
        model.match.basis.normal_()
        model.match.texts.normal_()
        model.query_tower.gate.fill_(1.0)
        model.query_tower.whitening.components.normal_()
        model.prior.normal_()
    return model


def _nowhere_zero(kind: type[Ranker]) -> Ranker:
    """A ranker that listens to everything: some start with weights, base rates or texts of zero."""
    torch.manual_seed(0)
    model = kind(SIZES, SETTINGS).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "shown_weight":
            torch.nn.init.normal_(tensor, std=0.3)
    return model


@pytest.fixture
def ranker() -> Ranker:
    return _listening(QERec)


def _input(n: int = 6) -> tuple:
    data = rows(SIZES, n)
    embedding, is_null = query_input(data, np.ones(n, int), slice(0, n))
    return to_batch(data), embedding, is_null


def test_attention_reads_the_other_two_and_never_itself() -> None:
    """The part of x' that attention adds depends on x through its query alone: with equal values it is constant."""
    torch.manual_seed(0)
    layer = MutualAttention(8, 2)
    u, v, z = (torch.randn(5, 8) for _ in range(3))
    mixed = _mixed(layer, u, v, z)
    with torch.no_grad():  # a vector's own key and value must not matter to itself
        for x in range(3):
            layer.qkv[x].weight[8:].normal_()
            changed = _mixed(layer, u, v, z)
            assert torch.equal(changed[x], mixed[x])
            assert not torch.allclose(changed[(x + 1) % 3], mixed[(x + 1) % 3])
            assert not torch.allclose(changed[(x + 2) % 3], mixed[(x + 2) % 3])
            mixed = changed


def _mixed(layer: MutualAttention, *vectors: torch.Tensor) -> list[torch.Tensor]:
    caught: list[torch.Tensor] = []
    hooks = [out.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].clone())) for out in layer.out]
    layer(*vectors)
    for hook in hooks:
        hook.remove()
    return caught


def test_mutual_attention_equals_softmax_attention_with_a_mask() -> None:
    torch.manual_seed(1)
    layer = MutualAttention(8, 2)
    vectors = [torch.randn(5, 8) for _ in range(3)]
    q, k, v = (
        torch.stack([layer.qkv[x](vectors[x]).chunk(3, -1)[part].view(5, 2, 4) for x in range(3)], dim=2)
        for part in range(3)
    )
    logits = (q @ k.transpose(-1, -2)) / 2.0
    weights = logits.masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf).softmax(-1)
    expected = (weights @ v).permute(2, 0, 1, 3).reshape(3, 5, 8)
    for found, wanted in zip(_mixed(layer, *vectors), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_scores_follow_candidates_through_order_and_padding(kind: type[Ranker]) -> None:
    model = _nowhere_zero(kind)
    batch, embedding, is_null = _input()
    scores = model(batch, embedding, is_null)
    assert scores.std() > 1e-3
    order = torch.randperm(scores.shape[1])
    torch.testing.assert_close(
        model({**batch, "candidates": batch["candidates"][:, order]}, embedding), scores[:, order]
    )
    padded = torch.cat([batch["candidates"], torch.full((6, 3), -1, dtype=torch.int32)], dim=1)
    wider = model({**batch, "candidates": padded}, embedding)
    torch.testing.assert_close(wider[:, :-3], scores)
    assert torch.isneginf(wider[:, -3:]).all()


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_scores_of_a_session_depend_on_no_other_session(kind: type[Ranker]) -> None:
    model = _nowhere_zero(kind)
    batch, embedding, is_null = _input()
    scores = model(batch, embedding, is_null)
    assert scores.std() > 1e-3
    alone = model({name: values[2:3] for name, values in batch.items()}, embedding[2:3], is_null[2:3])
    torch.testing.assert_close(alone, scores[2:3])


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_the_base_rate_is_an_offset_of_every_score(kind: type[Ranker]) -> None:
    """But of the cosine, which knows nothing of the log."""
    torch.manual_seed(0)
    model = kind(SIZES, SETTINGS).eval()
    batch, embedding, is_null = _input()
    without = model(batch, embedding, is_null)
    with torch.no_grad():
        model.prior.normal_()
    offset = model.prior[batch["candidates"].long()] * (kind.kind != "cosine")
    torch.testing.assert_close(model(batch, embedding, is_null), without + offset)


def test_the_configuration_names_every_baseline() -> None:
    assert set(get_args(config.Model)) == MODELS.keys()
    assert not any(MODELS[kind].reads_queries for kind in get_args(config.Baseline)), (
        "the loop makes no embeddings for them"
    )


def _history(length: int = 5, n: int = 4) -> torch.Tensor:
    """Event ids [n, length] with 0, 1, 2, … places of padding in front."""
    history = torch.randint(1, SIZES.history_size, (n, length))
    return history * (torch.arange(length) >= torch.arange(n)[:, None])


@pytest.mark.parametrize("attention", [TargetAttention(8), TargetTransformer(SETTINGS.model_copy(update={"dim": 8}))])
def test_padded_events_are_not_read(attention: torch.nn.Module) -> None:
    attention.eval()
    padding = _history() == 0
    events, v = torch.randn(4, 5, 8), torch.randn(4, 3, 8)
    changed = torch.where(padding[..., None], events + 1, events)
    torch.testing.assert_close(attention(changed, padding, v), attention(events, padding, v))
    assert not torch.allclose(attention(events + 1, padding, v), attention(events, padding, v))


def test_the_target_transformer_is_one_layer_over_events_and_candidate() -> None:
    """Against softmax attention over a session's events and one candidate at a time, written out."""
    torch.manual_seed(0)
    layer = TargetTransformer(SETTINGS.model_copy(update={"dim": 8, "heads": 2})).eval()
    history = _history()
    events, v = torch.randn(4, 5, 8), torch.randn(4, 3, 8)
    found = layer(events, history == 0, v)
    for session in range(4):
        for candidate in range(3):
            sequence = torch.cat([events[session][history[session] > 0], v[session, candidate][None]])
            query = layer.query(sequence[-1:]).view(1, 2, 4)
            key, value = layer.key(sequence).view(-1, 2, 4), layer.value(sequence).view(-1, 2, 4)
            weights = ((query * key).sum(-1) / 2.0).softmax(dim=0)
            attended = layer.norms[0](sequence[-1] + (weights[..., None] * value).sum(dim=0).flatten())
            expected = layer.norms[1](attended + layer.feedforward(attended))
            torch.testing.assert_close(found[session, candidate], expected)


def test_causal_history_reads_as_if_there_were_no_padding() -> None:
    torch.manual_seed(0)
    encoder = CausalHistory(SIZES, SETTINGS).eval()
    history = _history(n=6)
    found = encoder(history)
    assert found.isfinite().all()
    assert (found[5] == 0).all(), "a session without events"
    whole = encoder.events.age
    for session in range(5):
        length = int((history[session] > 0).sum())
        encoder.events.age = torch.nn.Parameter(whole[-length:])
        torch.testing.assert_close(encoder(history[session : session + 1, -length:])[0], found[session])


@pytest.mark.parametrize("kind", READING)
def test_null_query_ignores_the_embedding_even_if_it_is_nan(kind: type[Ranker]) -> None:
    ranker = _listening(kind)
    with torch.no_grad():
        ranker.query_tower.null.normal_()
    batch, embedding, _ = _input()
    null = torch.ones(6, dtype=torch.bool)
    expected = ranker(batch, None)
    assert torch.equal(ranker(batch, embedding, null), expected)
    assert torch.equal(ranker(batch, torch.full_like(embedding, torch.nan), null), expected)
    assert not torch.allclose(ranker(batch, embedding), expected)


@pytest.mark.parametrize("kind", READING)
def test_null_query_sends_no_nan_into_the_gradient(kind: type[Ranker]) -> None:
    ranker = _listening(kind)
    batch, embedding, _ = _input()
    embedding[0] = torch.nan
    ranker(batch, embedding, torch.arange(6) == 0).sum().backward()
    assert all(p.grad.isfinite().all() for p in ranker.parameters() if p.grad is not None)


def test_the_cosine_compares_what_texts_say_beyond_their_means_and_null_is_close_to_nothing() -> None:
    model = MODELS["cosine"](SIZES, SETTINGS).eval()
    draw = np.random.default_rng(0)
    texts = 5 + draw.normal(size=(SIZES.num_intents, SIZES.embedding_dim))
    sessions = 3 * draw.normal(size=(50, SIZES.embedding_dim)) - 9
    model.match.fit(texts, Moments.of(sessions), Moments.of(sessions[:0]))
    texts, mean = torch.from_numpy(texts - texts.mean(axis=0)).float(), torch.from_numpy(sessions.mean(axis=0)).float()
    batch, embedding, _ = _input()
    embedding[0] = 3 * texts[2] + mean  # says what the text of intent 2 does, at another length
    batch["candidates"] = torch.arange(SIZES.num_intents).expand(6, -1)
    scores = model(batch, embedding, torch.arange(6) == 5)
    expected = torch.nn.functional.cosine_similarity((embedding - mean)[:, None], texts[None], dim=-1)
    torch.testing.assert_close(scores[:5], expected[:5])
    assert scores[0].argmax() == 2 and scores[0, 2] == pytest.approx(1.0)
    assert (scores[5] == 0).all()


def test_fresh_query_tower_says_null_and_its_gate_can_open() -> None:
    tower = QueryTower(SIZES, SETTINGS)
    tower.whitening.fit(Moments.of(np.random.default_rng(0).normal(size=(50, SIZES.embedding_dim))))
    with torch.no_grad():
        tower.null.normal_()
    z = tower(torch.randn(7, SIZES.embedding_dim), torch.zeros(7, dtype=torch.bool))
    assert torch.equal(z, tower.null.expand(7, -1))
    z.square().sum().backward()
    assert tower.gate.grad.abs().min() > 0


def test_n_queries_at_once_score_as_one_by_one(ranker: Ranker) -> None:
    batch, _, _ = _input()
    embeddings = torch.randn(6, 4, SIZES.embedding_dim)
    is_null = torch.zeros(6, 4, dtype=torch.bool)
    is_null[:, 0] = True
    queries = ranker.queries(embeddings, is_null)
    together = ranker.score(ranker.users(batch), ranker.items(), batch["candidates"], queries)
    assert together.shape == (6, 4, SIZES.num_intents)
    for n in range(4):
        torch.testing.assert_close(together[:, n], ranker(batch, embeddings[:, n], is_null[:, n]))


def test_query_logits_are_the_scaled_dot_product_plus_the_match_and_the_prior(ranker: Ranker) -> None:
    z, match = torch.randn(2, 3, SETTINGS.dim), torch.randn(2, 3, SIZES.match_dim)
    logits = ranker.query_logits(torch.cat([z, match], dim=-1))
    v, texts = ranker.parted(ranker.items())
    expected = float((z[1, 2] @ v[5]).detach()) / SETTINGS.tau + float(match[1, 2] @ texts[5]) + float(ranker.prior[5])
    assert float(logits[1, 2, 5].detach()) == pytest.approx(expected, abs=1e-4)


def test_an_intent_training_never_showed_is_ranked_by_its_text() -> None:
    torch.manual_seed(0)
    with_text = sizes(item_dim=4)
    tower = QERec(with_text, SETTINGS).eval().item_tower
    seen = torch.ones(with_text.num_intents, dtype=torch.bool)
    seen[[2, 3]] = False
    tower.text.normal_()
    tower.text[2] = tower.text[3] = tower.text[0]
    assert torch.equal(tower(seen)[2], tower(seen)[3])
    with torch.no_grad():
        tower.gate.fill_(1.0)
    items = tower(seen)
    assert torch.equal(items[2], items[3])
    assert not torch.allclose(items[2], items[0])
    tower.text[3] += 1
    assert not torch.allclose(tower(seen)[2], tower(seen)[3])


def test_a_step_moves_one_whitened_number_by_one_and_no_other() -> None:
    whitening = Whitening(6, 8)
    x = np.random.default_rng(0).normal(size=(40, 6)) * [9, 3, 1, 1, 0.1, 0]
    whitening.fit(Moments.of(x))
    moved = whitening(torch.from_numpy(x[:1]).float() + whitening.steps) - whitening(torch.from_numpy(x[:1]).float())
    torch.testing.assert_close(moved, torch.diag(torch.tensor([1.0] * 5 + [0.0] * 3)), atol=1e-3, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 60), st.integers(2, 12), st.integers(1, 12))
def test_whitened_vectors_have_unit_variance_and_parts_add_up(seed: int, n: int, dim: int, k: int) -> None:
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(n, dim)) @ draw.normal(size=(dim, dim)) + 5
    whitening, parts = Whitening(dim, min(k, dim)), Whitening(dim, min(k, dim))
    whitening.fit(Moments.of(vectors))
    parts.fit(Moments.of(vectors[: n // 2]) + Moments.of(vectors[n // 2 :]))
    torch.testing.assert_close(
        whitening.components @ whitening.components.T, parts.components @ parts.components.T, rtol=1e-3, atol=1e-3
    )
    out = whitening(torch.tensor(vectors, dtype=torch.float32)).numpy()
    live = min(k, dim, n - 1)
    variance = out.var(axis=0)
    assert np.abs(out.mean(axis=0)).max() < 2e-2
    assert (variance[live:] == 0).all()
    spectrum = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[::-1][:live]
    there = (spectrum > 1e-3 * spectrum[0]).sum()  # well above what counts as noise
    assert np.abs(variance[:there] - 1).max() < 5e-2
    assert all(v == 0 or abs(v - 1) < 5e-2 for v in variance[there:live].tolist())


@pytest.mark.parametrize("kind", [QERec, DINSentence])
def test_where_intents_are_ranked_all_but_the_match_weighs_as_it_does_among_the_shown(kind: type[Ranker]) -> None:
    model, inputs = _nowhere_zero(kind), _input()
    trained = model(*inputs)
    model.match.gate.data.zero_()
    towers = model(*inputs)
    model.match.gate.data.fill_(0.5)
    match = model(*inputs) - towers
    model.shown_weight.fill_(0.25)
    torch.testing.assert_close(model(*inputs), towers + match)
    model.rank()
    torch.testing.assert_close(model(*inputs), towers / 4 + match)
    assert match.std() > 1e-2 and not torch.equal(model(*inputs).argsort(), trained.argsort())


@pytest.mark.parametrize("ranks", [False, True])
def test_the_parts_of_a_score_are_what_they_are_called(ranks: bool) -> None:
    model = _nowhere_zero(QERec)
    model.tower_weight = 0.3 if ranks else 1.0
    batch, embedding, is_null = _input()
    u, items, z = model.users(batch), model.items(), model.queries(embedding, is_null)
    candidates = batch["candidates"]
    base, user, query, _ = model.parts(u, items, candidates, z).unbind(-1)
    torch.testing.assert_close(base, model.prior[candidates.long()] * model.tower_weight)
    _, alone, nothing, _ = model.parts(u, items, candidates, torch.zeros_like(z)).unbind(-1)
    torch.testing.assert_close(alone, user)
    assert not nothing.any() and query.abs().max() > 1e-3
    torch.testing.assert_close(model.parts(u, items, candidates, z).sum(-1), model.score(u, items, candidates, z))
