from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.evaluate import plackett_luce


def brute_force(weights: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All slates of one session, their probabilities by drawing without replacement, and the marginals [C, slots]."""
    slates = np.array(list(permutations(range(len(weights)), slots)))
    marginals, chances = np.zeros((len(weights), slots)), []
    for slate in slates:
        left, chance = weights.sum(), 1.0
        for item in slate:
            chance *= weights[item] / left
            left = sum(
                weights[other] for other in range(len(weights)) if other not in slate[: list(slate).index(item) + 1]
            )
        chances.append(chance)
        marginals[slate, np.arange(slots)] += chance
    return slates, np.array(chances), marginals


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 5.0]), st.integers(3, 6))
def test_slates_and_marginals_equal_brute_force(seed: int, temperature: float, candidates: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(1, candidates))
    logits = plackett_luce.logits(scores, np.ones_like(scores, dtype=bool), temperature)
    slates, chances, marginals = brute_force(np.exp(logits[0]), 3)
    found = plackett_luce.conditional(np.repeat(logits, len(slates), axis=0), slates).prod(axis=1)
    assert found == pytest.approx(chances, rel=1e-9, abs=1e-300)
    assert plackett_luce.marginals(logits, 3)[0] == pytest.approx(marginals, rel=1e-9, abs=1e-15)


def test_marginals_of_a_policy_so_sharp_that_differences_of_sums_would_be_noise() -> None:
    logits = plackett_luce.logits(np.array([[0.0, -60.0, -90.0, -95.0]]), np.ones((1, 4), dtype=bool))
    marginals = plackett_luce.marginals(logits, 3)[0]
    assert np.diag(marginals) == pytest.approx(np.ones(3), abs=1e-2)
    assert marginals[1, 0] == pytest.approx(np.exp(-60.0))
    assert marginals[2, 1] == pytest.approx(np.exp(-30.0))
    assert np.allclose(marginals.sum(axis=0), 1.0)


def test_padding_and_short_lists_leave_slots_empty() -> None:
    scores = np.array([[1.0, 2.0, 7.0, 7.0], [0.0, 1.0, 2.0, 3.0]])
    mask = np.array([[True, True, False, False], [True] * 4])
    logits = plackett_luce.logits(scores, mask)
    marginals = plackett_luce.marginals(logits, 3)
    assert marginals.sum(axis=1) == pytest.approx(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    assert not marginals[0, 2:].any()
    slates = plackett_luce.sample(logits, 3, np.random.default_rng(0))
    assert set(slates[0, :2]) == {0, 1} and slates[0, 2] == -1 and -1 not in slates[1]
    assert plackett_luce.conditional(logits, slates)[0, 1:] == pytest.approx([1.0, 1.0])


def test_slates_are_drawn_with_their_probabilities_and_under_common_random_numbers() -> None:
    logits = plackett_luce.logits(np.array([[1.0, 0.0, 0.5, -1.0]]), np.ones((1, 4), dtype=bool))
    many = np.repeat(logits, 60_000, axis=0)
    drawn = plackett_luce.sample(many, 3, np.random.default_rng(1))
    shares = np.stack([(drawn == item).mean(axis=0) for item in range(4)])
    assert shares == pytest.approx(plackett_luce.marginals(logits, 3)[0], abs=0.01)
    again = plackett_luce.sample(many + 3.0, 3, np.random.default_rng(1))
    assert np.array_equal(drawn, again)


@pytest.mark.parametrize(
    ("scores", "mask", "temperature", "message"),
    [
        (np.zeros((1, 2)), np.ones((1, 3)), 1.0, "one \\[S, C\\]"),
        (np.zeros((1, 2)), np.ones((1, 2)), 0.0, "temperature"),
        (np.zeros((1, 2)), np.zeros((1, 2)), 1.0, "a candidate"),
        (np.array([[0.0, np.nan]]), np.ones((1, 2)), 1.0, "finite"),
    ],
)
def test_it_refuses_what_is_no_policy(scores: np.ndarray, mask: np.ndarray, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plackett_luce.logits(scores, mask, temperature)


def test_it_refuses_slates_too_long_and_lists_too_wide() -> None:
    with pytest.raises(ValueError, match="at most 3 positions"):
        plackett_luce.marginals(np.zeros((1, 5)), 4)
    with pytest.raises(ValueError, match="Prefix weights"):
        plackett_luce.marginals(np.zeros((1, 10_000)), 3)
