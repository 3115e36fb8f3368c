"""Where an alignment is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.evaluate.diagnosis import averaged, common, diagnose, moved, sentence


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_common_shift_is_no_movement_and_another_session_is_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    before = random.normal(size=(4000, 6)) * np.arange(1, 7)
    assert moved(before, before + 3.0) == pytest.approx(0.0, abs=1e-9)
    assert moved(before, before[random.permutation(4000)]) == pytest.approx(1.0, abs=0.05)
    assert moved(before, 1.5 * before) == pytest.approx(0.5 / np.sqrt(2))
    assert moved(100 * before, 150 * before) == pytest.approx(0.5 / np.sqrt(2)), "in no unit"


def test_what_moves_all_alike_is_common() -> None:
    before = np.random.default_rng(0).normal(size=(4000, 6))
    apart = np.random.default_rng(1).normal(size=(4000, 6))
    assert common(before, before + 3.0) == pytest.approx(1.0)
    assert common(before, before + apart) == pytest.approx(0.0, abs=1e-2)
    assert common(before, before + apart + 1.0) == pytest.approx(0.5, abs=0.02)


def test_each_question_has_its_figure() -> None:
    before = {"a": "parcel?", "b": "refund?", "c": "card?"}
    after = {"a": "parcel?", "b": "money back?", "d": "new?"}
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    found = diagnose(
        "Round 1",
        {"agreement": 0.05, "agreement_error": 0.01},
        (before, after),
        (vectors, 2 * vectors),
        ("true CTR@3", 0.01),
    )
    assert (found.informative, found.informative_error) == (0.05, 0.01)
    assert (found.queries, found.queries_changed) == (2, 0.5)
    assert found.moved == pytest.approx(1 / np.sqrt(2))
    assert (found.read, found.read_metric) == (pytest.approx(0.01), "true CTR@3")
    said = sentence(found)
    assert (
        "+0.0500 ± 0.0100" in said
        and "50% of 2" in said
        and "0.71" in said
        and "% of the movement" in said
        and "+0.0100 true CTR@3 from them" in said
    )


def test_without_queries_nothing_is_said_to_have_changed() -> None:
    vectors = np.eye(3)
    found = diagnose("Round 1", {"agreement": 0.0, "agreement_error": 0.1}, ({}, {}), (vectors, vectors), ("GAUC", 0.0))
    assert found.queries == 0 and np.isnan(found.queries_changed)
    assert "no query was" in sentence(found)


def test_seeds_are_averaged_and_their_errors_shrink() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    gates = [{"agreement": 0.05, "agreement_error": 0.03}, {"agreement": 0.07, "agreement_error": 0.04}]
    queries = [({"a": "x"}, {"a": "y"}), ({"a": "x", "b": "z"}, {"a": "x", "b": "z"})]
    found = averaged(
        [
            diagnose("RG-SFT", gate, pair, (vectors, vectors), ("GAUC", 0.02))
            for gate, pair in zip(gates, queries, strict=True)
        ]
    )
    assert (found.informative, found.informative_error) == (pytest.approx(0.06), pytest.approx(0.025))
    assert (found.queries, found.queries_changed) == (3, 0.5)
