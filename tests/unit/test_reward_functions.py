"""A query's worth, against a naive reference; and the faults that keep a query from being judged."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray import config, metrics, schema
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.reasoner.engine import Sample
from rgalign_ray.reward import functions

Judged = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def judged(draw: st.DrawFn) -> Judged:
    """Scores [S, N, C] of ragged sessions, some of them without a click, and garbage on the padding."""
    sessions, queries, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.normal(size=(sessions, queries, width)) * draw(st.sampled_from([0.1, 3.0, 300.0]))
    mask = np.arange(width) < random.integers(1, width + 1, sessions)[:, None]
    clicks = random.random((sessions, width)) < 0.4
    return np.where(mask[:, None], scores, 1e6), clicks, mask


def naive_logprob(scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray) -> np.ndarray:
    result = np.full(scores.shape[:2], np.nan)
    for s, n in np.ndindex(*scores.shape[:2]):
        there = [c for c in range(scores.shape[2]) if mask[s, c]]
        top = max(scores[s, n, c] for c in there)
        total = sum(math.exp(scores[s, n, c] - top) for c in there)
        logs = [scores[s, n, c] - top - math.log(total) for c in there if clicks[s, c]]
        if logs:
            result[s, n] = sum(logs) / len(logs)
    return result


@settings(deadline=None)
@given(judged())
def test_logprob_is_the_naive_softmax(case: Judged) -> None:
    np.testing.assert_allclose(functions.logprob(*case), naive_logprob(*case), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(judged())
def test_ndcg_is_each_querys_own(case: Judged) -> None:
    scores, clicks, mask = case
    one_by_one = [metrics.ndcg_at_k(scores[:, n], clicks & mask, mask, 2) for n in range(scores.shape[1])]
    np.testing.assert_allclose(functions.ndcg(*case, k=2), np.stack(one_by_one, axis=1))


@settings(deadline=None)
@given(judged(), st.integers(0, 2**32 - 1), st.sampled_from(["logprob", "ndcg"]))
def test_reward_depends_on_neither_order_nor_level_nor_padding(case: Judged, seed: int, kind: str) -> None:
    scores, clicks, mask = case
    random = np.random.default_rng(seed)

    def reward(scores: np.ndarray, clicks: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return functions.logprob(scores, clicks, mask) if kind == "logprob" else functions.ndcg(scores, clicks, mask, 2)

    expected = reward(scores, clicks, mask)
    order = random.permutation(scores.shape[2])
    np.testing.assert_allclose(reward(scores[..., order], clicks[:, order], mask[:, order]), expected, atol=1e-9)
    level = random.integers(-1000, 1000, scores.shape[:2])[..., None]  # of its own for each query
    np.testing.assert_allclose(reward(scores + level, clicks, mask), expected, atol=1e-6)
    wider = [np.pad(scores, ((0, 0), (0, 0), (0, 2)), constant_values=9e9)]
    wider += [np.pad(clicks, ((0, 0), (0, 2)), constant_values=True), np.pad(mask, ((0, 0), (0, 2)))]
    np.testing.assert_allclose(reward(*wider), expected, atol=1e-9)


def test_logprob_by_hand() -> None:
    scores = np.log([[[1.0, 2.0, 1.0], [6.0, 1.0, 1.0]]]).astype(np.float32)
    clicks, mask = np.array([[True, True, False]]), np.ones((1, 3), bool)
    expected = [[(math.log(0.25) + math.log(0.5)) / 2, (math.log(0.75) + math.log(0.125)) / 2]]
    np.testing.assert_allclose(functions.logprob(scores, clicks, mask), expected, rtol=1e-6)


def test_raising_the_clicked_intent_raises_the_reward() -> None:
    scores = np.zeros((1, 2, 5))
    scores[0, 1, 3] = 1.0
    clicks, mask = np.eye(5, dtype=bool)[[3]], np.ones((1, 5), bool)
    none, raised = functions.logprob(scores, clicks, mask)[0]
    assert none == pytest.approx(-math.log(5))
    assert raised > none
    none, raised = functions.ndcg(scores, clicks, mask, 1)[0]
    assert (none, raised) == (pytest.approx(0.2), 1.0), "ties share the first place"


def sample(**changes: object) -> Sample:
    sound = {
        "query": "where is it",
        "completion_ids": [5, 6, 7, 2],
        "logprobs": [-0.1] * 4,
        "finish": "stop",
        "seed": 1,
        "embedding": np.ones(4, np.float16),
    }
    return Sample(**(sound | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"query": ""}, "empty"),
        ({"finish": "length"}, "over_length"),
        ({"embedding": np.array([1, np.inf, 0], np.float16)}, "non_finite"),
        ({"embedding": np.array([1, np.nan, 0], np.float16)}, "non_finite"),
        ({"completion_ids": [1, 2, 3, 1, 2, 3, 1, 2, 3, 9]}, "loop"),
        ({"completion_ids": [4, 4, 4, 4, 4]}, "loop"),
        ({"completion_ids": [1, 2, 3, 9, 1, 2, 3, 8]}, None),
        ({"completion_ids": [4, 4, 4, 4]}, None),
        ({"completion_ids": [2]}, None),
        ({"completion_ids": [1, 2] * 2}, None),
        ({"embedding": np.full(3, 65504, np.float16)}, None),
    ],
)
def test_fault(changes: dict, reason: str | None) -> None:
    assert functions.fault(sample(**changes)) == reason


@settings(deadline=None)
@given(judged(), st.sampled_from(["logprob", "ndcg"]))
def test_clicks_and_resolution_share_the_reward(case: Judged, kind: str) -> None:
    scores, clicks, mask = case
    resolved = clicks & (np.arange(clicks.shape[1]) % 2 == 0)

    def of(weight: float, labels: functions.Labels) -> np.ndarray:
        return functions.reward(config.Reward(kind=kind, resolved_weight=weight), scores, labels, mask)  # type: ignore[arg-type]

    both, alone = functions.Labels(clicks, resolved), functions.Labels(clicks, None)
    clicked, solved = of(0.0, alone), of(1.0, both)
    np.testing.assert_array_equal(of(0.0, both), clicked)
    np.testing.assert_array_equal(np.isnan(solved).all(axis=1), ~(resolved & mask).any(axis=1))
    np.testing.assert_allclose(of(0.25, both), 0.75 * clicked + 0.25 * np.nan_to_num(solved))


def test_a_log_that_knows_no_resolution_cannot_be_asked_for_it() -> None:
    rows = [{"intent_id": i, "title": i, "description": i, "category": i} for i in "ab"]
    intents = pa.Table.from_pylist(rows, schema=schema.INTENTS)
    sessions = pa.table({"candidates": [["a", "b"]], "clicks": [[True, False]]})
    catalogue = Catalogue(intents, None)
    candidates = catalogue.candidates(sessions)
    arrays = {"candidates": candidates, "clicks": catalogue.padded(sessions["clicks"], candidates)}
    assert functions.Labels.of(config.Reward(), sessions, arrays, catalogue).resolved is None
    with pytest.raises(DataError, match="no column 'resolved'"):
        functions.Labels.of(config.Reward(resolved_weight=0.5), sessions, arrays, catalogue)
    marked = sessions.append_column("resolved", pa.array([[True, True]]))
    found = functions.Labels.of(config.Reward(resolved_weight=0.5), marked, arrays, catalogue).resolved
    assert found is not None and found.tolist() == [[True, False]], "what was not clicked resolved nothing"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 9))
def test_halves_share_no_click_and_lose_none_whatever_the_order(seed: int, sessions: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    candidates = np.stack([draw.permutation(30)[:width] for _ in range(sessions)])
    clicks = draw.random((sessions, width)) < 0.6
    keys = draw.integers(0, 2**62, size=sessions)
    mine, other = functions.halves(clicks, candidates, keys)
    np.testing.assert_array_equal(mine | other, clicks)
    assert not (mine & other).any()
    assert set((mine.sum(axis=1) - other.sum(axis=1)).tolist()) <= {0, 1}
    order = draw.permutation(width)
    moved = functions.halves(clicks[:, order], candidates[:, order], keys)
    np.testing.assert_array_equal(moved[0], mine[:, order])


def test_which_half_a_click_falls_into_depends_on_the_session() -> None:
    clicks, candidates = np.ones((500, 2), bool), np.tile([3, 8], (500, 1))
    mine, _ = functions.halves(clicks, candidates, np.random.default_rng(0).integers(0, 2**62, size=500))
    assert 0.4 < mine[:, 0].mean() < 0.6


def test_the_auditor_reads_the_other_half() -> None:
    clicks = np.ones((3, 4), bool)
    candidates = np.tile(np.arange(4), (3, 1))
    arrays = {"candidates": candidates, "clicks": clicks, "session_key": np.arange(3)}
    asked = config.Reward(halves=True)
    mine, other = (
        functions.Labels.of(asked, pa.table({}), arrays, None, reader).clicks  # type: ignore[arg-type]
        for reader in ("reward", "auditor")
    )
    np.testing.assert_array_equal(mine, ~other)
    whole = functions.Labels.of(config.Reward(), pa.table({}), arrays, None, "auditor").clicks  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole, clicks)


def test_labels_of_some_sessions_are_all_that_these_have() -> None:
    labels = functions.Labels(np.eye(4, dtype=bool), np.eye(4, dtype=bool)[::-1])
    taken = labels.take(np.array([2, 0]))
    np.testing.assert_array_equal(taken.clicks, labels.clicks[[2, 0]])
    assert taken.resolved is not None
    np.testing.assert_array_equal(taken.resolved, np.eye(4, dtype=bool)[::-1][[2, 0]])
    assert functions.Labels(labels.clicks, None).take(np.array([1])).resolved is None
