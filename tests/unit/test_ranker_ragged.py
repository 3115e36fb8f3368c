"""Lists without padding, and logs in which one session has very many candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranker_data import rows, sizes

from rgalign_ray import config, metrics
from rgalign_ray.ranker import batches, ragged
from rgalign_ray.ranker import fit as fitting
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.ragged import Ragged, narrow
from rgalign_ray.ranker.rows import from_tables, to_table

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8)
SETTINGS = config.Ranker(dim=8, heads=2, epochs=1, batch_sessions=16, whitened_dim=8, dropout=0.0)
MANY, FEW = 10_000, 50


def _of(lists: list[list[int]]) -> Ragged:
    values = [value for part in lists for value in part]
    return Ragged(np.array(values, np.int32), np.array([len(part) for part in lists], np.int64), np.int32(-1))


def _lists(held: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(held.values, np.cumsum(held.counts)[:-1])] if len(held) else []


@given(LISTS, st.data())
def test_an_index_picks_lists_as_it_picks_rows(lists: list[list[int]], data: st.DataObject) -> None:
    held, n = _of(lists), len(lists)
    start, stop = (data.draw(st.integers(0, n + 2)) for _ in range(2))
    assert _lists(held[start:stop]) == lists[start:stop]
    chosen = data.draw(st.lists(st.integers(0, n - 1), max_size=6)) if n else []
    assert _lists(held[np.array(chosen, int)]) == [lists[row] for row in chosen]
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    assert _lists(held[np.array(mask, bool)]) == [part for part, taken in zip(lists, mask, strict=True) if taken]


@given(LISTS)
def test_padding_comes_and_goes(lists: list[list[int]]) -> None:
    held = _of(lists)
    padded = held.padded()
    width = max(1, *map(len, lists), 1)
    assert padded.tolist() == [part + [-1] * (width - len(part)) for part in lists]
    assert padded.dtype == np.int32
    again = Ragged.of(padded, padded >= 0, np.int32(-1))
    assert _lists(again) == lists
    assert held.sums().tolist() == [sum(part) for part in lists]


@given(st.lists(st.integers(0, 90), max_size=40), st.integers(0, 45), st.integers(1, 45))
def test_narrow_pieces_are_the_batch_and_stay_small(counts: list[int], start: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "MAX_PLACES", 100)
        pieces = narrow(np.array(counts, np.int64), slice(start, start + size))
    numbers = np.arange(len(counts))
    batch = numbers[start : start + size]
    taken = [numbers[piece] for piece in pieces]
    assert sorted(np.concatenate([numbers[:0], *taken]).tolist()) == batch.tolist()
    assert all(len(part) == 1 or len(part) * max(counts[row] for row in part) <= 100 for part in taken)
    if len(batch) and len(batch) * max(counts[row] for row in batch) <= 100:
        assert [part.tolist() for part in taken] == [batch.tolist()], "a batch that fits stays as it is"


@given(st.lists(st.integers(0, 90), min_size=1, max_size=40))
def test_a_batch_is_cut_where_that_saves_padding(counts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "WORTH_A_CUT", 200)
        pieces = narrow(np.array(counts, np.int64), slice(0, len(counts)))
    taken = [np.array(counts)[piece] for piece in pieces]
    assert sorted(np.concatenate(taken).tolist()) == sorted(counts)
    places = sum(len(part) * part.max() for part in taken)
    assert places <= len(counts) * max(counts) - 200 * (len(pieces) - 1)
    for part in map(np.sort, taken):
        assert all(cut * (part[-1] - part[cut - 1]) < 200 for cut in range(1, len(part))), "no cut is left that saves"


@given(LISTS, st.data())
def test_values_left_out_of_lists(lists: list[list[int]], data: st.DataObject) -> None:
    held = _of(lists)
    keep = data.draw(st.lists(st.booleans(), min_size=len(held.values), max_size=len(held.values)))
    marks = iter(keep)
    assert _lists(held.where(np.array(keep, bool))) == [[value for value in part if next(marks)] for part in lists]


def _wide_log(n: int = 36) -> tuple[dict, int]:
    """Sessions of 50 candidates, and a training one of 10,000; its row."""
    data = rows(sizes(intents=MANY), n)
    clicked = data["candidates"][data["clicks"]]
    for row in range(n):  # the clicked intent comes first, so that cutting the list keeps it
        here = np.isin(data["candidates"][row], clicked)
        order = np.argsort(~here, kind="stable")
        for name in ("candidates", "shown", "clicks"):
            data[name][row] = data[name][row][order]
    wide = 7
    short = np.arange(n) != wide
    data["candidates"][short, FEW:] = -1
    for name in ("shown", "clicks"):
        data[name] &= data["candidates"] >= 0
    assert not data["valid"][wide]
    return data, wide


def _fit(data: dict, kind: str = "qe_rec") -> Fit:
    return Fit(kind, sizes(intents=MANY), SETTINGS, data, None, seed=1, group=Group())


@pytest.mark.parametrize("kind", ["qe_rec", "din"])
def test_one_session_of_10000_candidates_does_not_widen_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as held in memory, nor in any batch of training and scoring."""
    data, wide = _wide_log()
    shapes: list[tuple[int, int]] = []
    to_batch = batches.to_batch

    def record(part: dict, device: str = "cpu") -> dict:
        batch = to_batch(part, device)
        shapes.append(tuple(batch["candidates"].shape))
        return batch

    for module in (fitting, batches):
        monkeypatch.setattr(module, "to_batch", record)
    tables = [to_table({name: values[part] for name, values in data.items()}) for part in (slice(9), slice(9, None))]
    held = from_tables(tables, sizes(intents=MANY))
    assert held["candidates"].values.nbytes == (35 * FEW + MANY) * 4
    fit = _fit(held, kind)
    assert np.isfinite(fit.run()["losses"]).all()
    assert (1, MANY) in shapes
    assert all(width == FEW for sessions, width in shapes if sessions > 1)
    scores = batches.score_rows(fit.model, data, "prompt")
    assert (np.isneginf(scores) == (data["candidates"] < 0)).all()
    alone = batches.score_rows(fit.model, {k: v[[wide]] for k, v in data.items()}, "prompt")
    np.testing.assert_allclose(scores[wide], alone[0], atol=1e-5)


def test_a_batch_cut_into_pieces_teaches_what_the_whole_would(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = _wide_log()
    cut = _fit(data)
    cut.run()
    monkeypatch.setattr(ragged, "MAX_PLACES", 10**9)
    whole = _fit(data)
    whole.run()
    np.testing.assert_allclose(cut.progress.losses, whole.progress.losses, rtol=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


def test_pieces_of_a_batch_draw_dropout_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple] = []
    monkeypatch.setattr(fitting, "_manual_seed", lambda *purpose: seeds.append(purpose))
    _fit(_wide_log()[0]).run()
    of_sessions = [seed for seed in seeds if "sessions" in seed]
    steps = {seed[2:4] for seed in of_sessions}
    assert len(of_sessions) == len(set(of_sessions)) == len(steps) + 1, "one step was cut in two"


def test_metrics_of_a_wide_session_among_short_ones_are_those_of_each_alone() -> None:
    draw = np.random.default_rng(0)
    counts = np.array([FEW] * 20 + [MANY] + [FEW] * 20)
    mask = np.arange(MANY) < counts[:, None]
    scores = np.where(mask, draw.integers(0, 200, size=mask.shape), -np.inf)
    clicks = mask & (draw.random(mask.shape) < 0.05)
    for metric in (metrics.recall_at_k, metrics.ndcg_at_k):
        alone = [metric(*(a[[i], :c] for a in (scores, clicks, mask)), 3)[0] for i, c in enumerate(counts)]
        np.testing.assert_allclose(metric(scores, clicks, mask, 3), alone, rtol=1e-12)
    auc = metrics.group_auc(scores[mask], clicks[mask], np.nonzero(mask)[0])
    assert dict(zip(auc.groups.tolist(), auc.weight.tolist(), strict=True))[20] == MANY
