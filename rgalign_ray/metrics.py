"""Ranking metrics, vectorised: GAUC, Recall@k, NDCG@k and what must be printed beside them.

Ties never depend on the order of the rows: an AUC counts them half, Recall@k and NDCG@k take the mean
over all orders of the tied candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupAuc:
    """AUC of each group that has both classes, sorted by group."""

    groups: np.ndarray
    """[G], the groups' keys."""
    auc: np.ndarray
    """float64 [G]"""
    weight: np.ndarray
    """int64 [G], impressions (rows) of the group."""


def group_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> GroupAuc:
    """AUC by group: the share of (positive, negative) pairs in the right order, ties counted half.

    It is the Mann-Whitney statistic: (rank sum of the positives - P(P+1)/2) / (P N), with mean ranks
    for ties.

    Args:
        scores: float [N].
        labels: bool or 0/1 [N].
        groups: [N], keys of any sortable type, in any order.

    Raises:
        ValueError: for unequal lengths, scores that are nan, or labels other than 0 and 1.
    """
    scores, labels = _checked(scores, labels, groups)
    keys, group = _numbered(np.asarray(groups))
    above, tied, of = _above_and_tied(scores, group, labels == 1)
    size, positives = np.bincount(group, minlength=len(keys)), np.bincount(of, minlength=len(keys))
    negatives = size - positives
    rank = size[of] - above - (tied - 1) / 2  # 1 is the lowest score; mean rank among the tied
    rank_sum = np.bincount(of, weights=rank, minlength=len(keys))
    both = (positives > 0) & (negatives > 0)
    p, n = positives[both], negatives[both]
    return GroupAuc(keys[both], (rank_sum[both] - p * (p + 1) / 2) / (p * n), size[both])


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Mean AUC of the groups with both classes, weighted by impressions; nan where no group has both.

    Source: Zhou et al., Deep Interest Network (2018), equation 7, with ties counted half.

    Args and raises: as `group_auc`.
    """
    result = group_auc(scores, labels, groups)
    return float(np.average(result.auc, weights=result.weight)) if len(result.auc) else float("nan")


def coverage(labels: np.ndarray, groups: np.ndarray) -> float:
    """Share of groups that have both classes, that is, that count in GAUC; nan without rows."""
    keys, group = _numbered(np.asarray(groups))
    size = np.bincount(group, minlength=len(keys))
    positives = np.bincount(group, weights=np.asarray(labels, dtype=np.float64), minlength=len(keys))
    return float(np.mean((positives > 0) & (positives < size))) if len(keys) else float("nan")


def recall_at_k(scores: np.ndarray, relevant: np.ndarray, mask: np.ndarray, k: int) -> np.ndarray:
    """Share of each session's relevant candidates that stand among its first k.

    Args:
        scores: float [S, C].
        relevant: bool [S, C].
        mask: bool [S, C], which candidates exist.
        k: at least 1.

    Returns:
        float64 [S], nan for a session without a relevant candidate.

    Raises:
        ValueError: for unequal shapes, a score that is nan where the mask is set, or k below 1.
    """
    above, tied, session = _standing(scores, relevant, mask, k)
    in_first_k = np.clip((k - above) / tied, 0, 1)
    size = len(mask)
    return _share(np.bincount(session, in_first_k, size), np.bincount(session, minlength=size))


def ndcg_at_k(scores: np.ndarray, relevant: np.ndarray, mask: np.ndarray, k: int) -> np.ndarray:
    """DCG of each session's first k, over the best that k candidates could reach; discount 1 / log2(rank + 1).

    Args, returns and raises: as `recall_at_k`. Source: Järvelin and Kekäläinen (2002), binary gain.
    """
    above, tied, session = _standing(scores, relevant, mask, k)
    summed = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    discount = (summed[np.minimum(above + tied, k)] - summed[np.minimum(above, k)]) / tied
    size = len(mask)
    best = summed[np.minimum(np.bincount(session, minlength=size), k)]
    return _share(np.bincount(session, discount, size), best)


def _standing(
    scores: np.ndarray, relevant: np.ndarray, mask: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each relevant candidate, int64 [R]: how many stand above it, how many tie with it (itself included),
    and its session. Nothing is as wide as the longest list: one session may have very many candidates."""
    scores, relevant, mask = np.asarray(scores), np.asarray(relevant, dtype=bool), np.asarray(mask, dtype=bool)
    if not scores.shape == relevant.shape == mask.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape}, relevant {relevant.shape} and mask {mask.shape} must be one [S, C].")
    if k < 1:
        raise ValueError(f"k must be at least 1; it is {k}.")
    flat, chosen, session = scores[mask].astype(np.float64), relevant[mask], np.nonzero(mask)[0]
    if np.isnan(flat).any():
        raise ValueError("scores must not be nan.")
    return _above_and_tied(flat, session, chosen)


def _numbered(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, sorted, and for each row the place of its key among them; sorts only what is not sorted."""
    if len(groups) and not (groups[1:] < groups[:-1]).any():
        starts = np.concatenate([[True], groups[1:] != groups[:-1]])
        return groups[starts], np.cumsum(starts) - 1
    keys, group = np.unique(groups, return_inverse=True)
    return keys, group


def _above_and_tied(
    scores: np.ndarray, group: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each chosen row, in no order, int64 [R]: rows of its group with a greater score, with an equal one (itself
    included), and its group."""
    # two quicksorts of plain numbers, which numpy has in vector instructions, are faster than one lexsort
    order = np.argsort(-scores)
    order = order[np.argsort(group[order] * len(order) + np.arange(len(order)))]
    g, s, place = group[order], scores[order], np.flatnonzero(chosen[order])
    new_group = np.concatenate([[True], g[1:] != g[:-1]])
    new_run = new_group | np.concatenate([[True], s[1:] != s[:-1]])
    groups, runs = np.flatnonzero(new_group), np.append(np.flatnonzero(new_run), len(order))
    group_start = groups[np.searchsorted(groups, place, side="right") - 1]
    run = np.searchsorted(runs, place, side="right") - 1
    return runs[run] - group_start, runs[run + 1] - runs[run], g[place]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _checked(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if scores.ndim != 1 or not scores.shape == labels.shape == np.shape(groups):
        raise ValueError(f"scores {scores.shape}, labels {labels.shape} and groups {np.shape(groups)} must be one [N].")
    if np.isnan(scores).any():
        raise ValueError("scores must not be nan.")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1.")
    return scores, labels
