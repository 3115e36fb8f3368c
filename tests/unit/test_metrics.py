from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import ndcg_score, roc_auc_score

from rgalign_ray import metrics


@st.composite
def rows(draw):
    """Scores with many ties, labels, and groups in any order, some of one class."""
    n = draw(st.integers(1, 60))
    scores = draw(hnp.arrays(np.float64, n, elements=st.integers(-3, 3).map(float)))
    labels = draw(hnp.arrays(bool, n))
    groups = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 6)))
    return scores, labels, groups


@st.composite
def sessions(draw):
    shape = (draw(st.integers(1, 6)), draw(st.integers(2, 8)))
    scores = draw(hnp.arrays(np.float64, shape, elements=st.integers(-2, 2).map(float)))
    return scores, draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape)), draw(st.integers(1, 9))


def slow_gauc(scores, labels, groups) -> float:
    aucs, weights = [], []
    for group in np.unique(groups):
        inside = groups == group
        if 0 < labels[inside].sum() < inside.sum():
            aucs.append(roc_auc_score(labels[inside], scores[inside]))
            weights.append(inside.sum())
    return float(np.average(aucs, weights=weights)) if aucs else math.nan


@settings(deadline=None)
@given(rows())
def test_gauc_is_the_impression_weighted_mean_of_scikit_learns_auc(data) -> None:
    scores, labels, groups = data
    assert metrics.gauc(scores, labels, groups) == pytest.approx(slow_gauc(scores, labels, groups), nan_ok=True)


@settings(deadline=None)
@given(rows())
def test_each_group_has_scikit_learns_auc_or_is_left_out_for_its_one_class(data) -> None:
    scores, labels, groups = data
    found = metrics.group_auc(scores, labels, groups)
    wanted = [g for g in np.unique(groups) if len(np.unique(labels[groups == g])) == 2]
    assert found.groups.tolist() == wanted
    for group, auc, weight in zip(found.groups, found.auc, found.weight, strict=True):
        inside = groups == group
        assert auc == pytest.approx(roc_auc_score(labels[inside], scores[inside]))
        assert weight == inside.sum()


@settings(deadline=None)
@given(sessions())
def test_ndcg_of_the_candidates_that_exist_is_scikit_learns(data) -> None:
    scores, relevant, mask, k = data
    ours = metrics.ndcg_at_k(scores, relevant, mask, k)
    for row, value in enumerate(ours):
        s, r = scores[row][mask[row]], relevant[row][mask[row]].astype(float)
        if not r.any():
            assert math.isnan(value)
        elif len(r) == 1:  # scikit-learn refuses a single document
            assert value == 1
        else:
            assert value == pytest.approx(ndcg_score([r], [s], k=k))


@settings(deadline=None)
@given(rows(), st.randoms(use_true_random=False))
def test_gauc_depends_neither_on_row_order_nor_on_the_kind_of_key(data, random) -> None:
    scores, labels, groups = data
    order = np.array(random.sample(range(len(scores)), len(scores)))
    names = np.array([f"user-{g}" for g in groups])
    shuffled = metrics.gauc(scores[order], labels[order], names[order])
    assert shuffled == pytest.approx(metrics.gauc(scores, labels, groups), nan_ok=True)


@settings(deadline=None)
@given(rows())
def test_constant_scores_give_one_half_wherever_a_group_counts(data) -> None:
    _, labels, groups = data
    value = metrics.gauc(np.zeros(len(labels)), labels, groups)
    covered = metrics.coverage(labels, groups) > 0
    assert value == 0.5 if covered else math.isnan(value)


def test_groups_of_one_class_are_left_out_and_lower_the_coverage() -> None:
    scores, labels = np.array([3, 1, 2, 9, 8.0]), np.array([1, 0, 0, 1, 1])
    groups = np.array(["a", "a", "a", "b", "b"])
    assert metrics.gauc(scores, labels, groups) == 1.0
    assert metrics.coverage(labels, groups) == 0.5
    result = metrics.group_auc(scores, labels, groups)
    assert result.groups.tolist() == ["a"]
    assert result.weight.tolist() == [3]


def test_gauc_without_any_row_is_nan() -> None:
    empty = np.empty(0)
    assert math.isnan(metrics.gauc(empty, empty, empty))
    assert math.isnan(metrics.coverage(empty, empty))


@pytest.mark.parametrize(
    ("scores", "labels", "groups"),
    [
        ([1.0, 2.0], [1], [0, 0]),
        ([1.0, 2.0], [1, 0], [0]),
        ([1.0, math.nan], [1, 0], [0, 0]),
        ([1.0, 2.0], [1, 2], [0, 0]),
        ([1.0, 2.0], [1, math.nan], [0, 0]),
        ([[1.0, 2.0]], [[1, 0]], [[0, 0]]),
    ],
    ids=["labels short", "groups short", "nan score", "label 2", "nan label", "two dimensions"],
)
def test_gauc_refuses(scores, labels, groups) -> None:
    with pytest.raises(ValueError, match=r"must (not )?be"):
        metrics.gauc(np.array(scores), np.array(labels), np.array(groups))


@settings(deadline=None)
@given(sessions())
def test_ndcg_is_scikit_learns_where_nothing_is_padded(data) -> None:
    scores, relevant, _, k = data
    ours = metrics.ndcg_at_k(scores, relevant, np.ones_like(relevant), k)
    for row, value in enumerate(ours):
        if relevant[row].any():
            assert value == pytest.approx(ndcg_score([relevant[row].astype(float)], [scores[row]], k=k))
        else:
            assert math.isnan(value)


@settings(deadline=None)
@given(sessions())
def test_recall_is_the_mean_over_all_orders_of_the_tied(data) -> None:
    scores, relevant, mask, k = data
    ours = metrics.recall_at_k(scores, relevant, mask, k)
    random = np.random.default_rng(0)
    for row in range(len(scores)):
        s, r = scores[row][mask[row]], relevant[row][mask[row]]
        if not r.any():
            assert math.isnan(ours[row])
            continue
        orders = [np.lexsort((random.random(len(s)), -s))[:k] for _ in range(300)]
        assert ours[row] == pytest.approx(np.mean([r[order].sum() for order in orders]) / r.sum(), abs=0.12)


@settings(deadline=None)
@given(sessions())
def test_padded_candidates_change_nothing(data) -> None:
    scores, relevant, mask, k = data
    other = np.where(mask, scores, np.nan)
    for metric in (metrics.recall_at_k, metrics.ndcg_at_k):
        np.testing.assert_array_equal(metric(scores, relevant, mask, k), metric(other, relevant | ~mask, mask, k))


def test_recall_and_ndcg_by_hand() -> None:
    scores, mask = np.array([[4.0, 3, 2, 1]]), np.ones((1, 4), dtype=bool)
    relevant = np.array([[False, True, False, True]])
    assert metrics.recall_at_k(scores, relevant, mask, 3).tolist() == [0.5]
    expected = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert metrics.ndcg_at_k(scores, relevant, mask, 3)[0] == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.recall_at_k, metrics.ndcg_at_k])
def test_top_k_refuses_bad_input(metric) -> None:
    good = np.zeros((2, 3)), np.zeros((2, 3), dtype=bool), np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match="one \\[S, C\\]"):
        metric(good[0][:1], *good[1:], 3)
    with pytest.raises(ValueError, match="nan"):
        metric(good[0] + np.nan, *good[1:], 3)
    with pytest.raises(ValueError, match="at least 1"):
        metric(*good, 0)
