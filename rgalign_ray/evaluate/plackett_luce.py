"""Plackett–Luce policies over slates: a ranker's scores, divided by a temperature, as logits drawn without replacement.

P(a_1 … a_K) = Π_k w(a_k) / Σ_{a not in a_1 … a_{k−1}} w(a), with w = exp(score / temperature)
(Luce, 1959; Plackett, 1975). Padding has weight 0. Slots beyond a session's candidates stay empty.
"""

from __future__ import annotations

import numpy as np

FAINTEST = -100.0
"""Logit below the best at which a candidate's own is cut off: e^−100 is as good as never, and sums stay finite."""
CELLS_AT_ONCE = 60_000
"""Pairs of candidates held at once; bounds the memory of `marginals`, and stays inside a core's cache."""
NOTHING_LEFT = 1e-200
"""Stands for 0 in a denominator, far below the faintest weight; what is divided by it counts for nothing."""
MOST_CANDIDATES = 4000
MOST_POSITIONS = 3


def logits(scores: np.ndarray, mask: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [S, C]: scores / temperature, the best of each session at 0, −inf where `mask` (bool [S, C]) is not set.

    Raises:
        ValueError: for unequal shapes, a temperature that is not positive, a session without a candidate, or a
            score of a candidate that is not finite.
    """
    scores, mask = np.asarray(scores, dtype=np.float64), np.asarray(mask, dtype=bool)
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise ValueError(f"scores {scores.shape} and mask {mask.shape} must be one [S, C].")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; it is {temperature}.")
    if not mask.any(axis=1).all():
        raise ValueError("every session must have a candidate.")
    if not np.isfinite(scores[mask]).all():
        raise ValueError("scores of candidates must be finite.")
    scaled = np.where(mask, scores / temperature, -np.inf)
    return np.where(mask, np.maximum(scaled - scaled.max(axis=1, keepdims=True), FAINTEST), -np.inf)


def sample(logits: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """int [S, size]: columns of a slate drawn for each session, −1 in slots that its candidates do not fill.

    The largest of logits with Gumbel noise, in order (Yellott, 1977). Equal states of `random` and equal shapes
    give equal noise, so that two policies can be compared under common random numbers.
    """
    return best(logits + random.gumbel(size=logits.shape), size)


def best(scores: np.ndarray, size: int) -> np.ndarray:
    """int [S, size]: columns of the largest scores in order, −1 where those left are −inf."""
    size = min(size, scores.shape[1])
    top = np.argpartition(-scores, size - 1, axis=1)[:, :size]
    values = np.take_along_axis(scores, top, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
    return np.where(np.isneginf(values), -1, top)


def conditional(logits: np.ndarray, slates: np.ndarray) -> np.ndarray:
    """float64 [S, K]: P(a_k | a_1 … a_{k−1}) of the slates' columns (int [S, K]); 1 in empty slots (−1)."""
    left = np.array(logits)
    out = np.ones(slates.shape)
    for k, chosen in enumerate(slates.T):
        row = np.flatnonzero(chosen >= 0)
        rest, own = left[row], left[row, chosen[row]]
        peak = rest.max(axis=1)
        out[row, k] = np.exp(own - peak) / np.exp(rest - peak[:, None]).sum(axis=1)
        left[row, chosen[row]] = -np.inf
    return out


def has_marginals(candidates: int, positions: int) -> bool:
    """Whether `marginals` covers slates of so many positions out of so many candidates."""
    return positions <= MOST_POSITIONS and candidates <= MOST_CANDIDATES


def marginals(logits: np.ndarray, positions: int) -> np.ndarray:
    """float64 [S, C, positions]: P(candidate c stands at position k), exactly.

    Sums that leave candidates out are not taken as differences where that would lose them: for a sharp policy
    what is left after the best is smaller than the rounding error of the whole. Time and memory grow with C².

    Raises:
        ValueError: for more than `MOST_POSITIONS` positions or `MOST_CANDIDATES` candidates.
    """
    sessions, candidates = logits.shape
    if not has_marginals(candidates, positions):
        raise ValueError(
            f"marginals are known for at most {MOST_POSITIONS} positions and {MOST_CANDIDATES:,} candidates; asked for "
            f"{positions} and {candidates:,}. Prefix weights need none."
        )
    rows = max(1, CELLS_AT_ONCE // candidates**2)
    out = np.empty((sessions, candidates, positions))
    for start in range(0, sessions, rows):
        part = slice(start, start + rows)
        out[part] = _marginals(np.exp(logits[part]), positions)
    return out


def _marginals(w: np.ndarray, positions: int) -> np.ndarray:
    first = w / w.sum(axis=1, keepdims=True)
    found = [first]
    if positions > 1:
        found.append(w * _others(_ratio(first, _others(w))))
    if positions > 2:
        found.append(_third(w))
    return np.stack(found, axis=-1)


def _third(w: np.ndarray) -> np.ndarray:
    """P(third) = w_i · Σ over pairs {a, b} without i of P(a and b come first) / what is then left.

    Candidates are taken in the order of their weights. Then the pair of the two heaviest has the greatest term,
    and only for these two would a difference from the sum over all pairs be lost to rounding.
    """
    order = np.argsort(-w, axis=1)
    v = np.take_along_axis(w, order, axis=1)
    size = v.shape[1]
    tail = np.concatenate([np.cumsum(v[:, ::-1], axis=1)[:, ::-1], np.zeros((len(v), 1))], axis=1)
    before = np.concatenate([np.zeros((len(v), 1)), np.cumsum(v[:, :-1], axis=1)], axis=1)
    either = _ratio(v, before + tail[:, 1:]) / tail[:, :1]
    left = tail[:, 1:, None] - tail[:, None, :-1]  # [a, b], a < b: all but these two; first those between
    left += before[:, :, None]
    left += tail[:, None, 1:]
    np.maximum(left, NOTHING_LEFT, out=left)
    left += np.where(np.arange(size)[:, None] < np.arange(size), 0.0, np.inf)
    term = v[:, :, None] * either[:, None, :]
    term += v[:, None, :] * either[:, :, None]
    term /= left
    with_a, with_b = term.sum(axis=2), term.sum(axis=1)
    without = (with_a.sum(axis=1, keepdims=True) - with_a) - with_b
    lighter = with_a[:, 2:].sum(axis=1)
    for heavy in range(min(2, size)):
        without[:, heavy] = lighter + (term[:, 1 - heavy, 2:].sum(axis=1) if size > 1 else 0.0)
    out = np.empty_like(w)
    np.put_along_axis(out, order, v * without, axis=1)
    return out


def _others(values: np.ndarray) -> np.ndarray:
    """[S, C], for each entry the sum of all others of its row, without subtracting."""
    before, after = np.zeros_like(values), np.zeros_like(values)
    np.cumsum(values[:, :-1], axis=1, out=before[:, 1:])
    np.cumsum(values[:, :0:-1], axis=1, out=after[:, -2::-1])
    return before + after


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
