from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate import logged_slates, plackett_luce, policy_value
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.world import kb
from rgalign_ray.world.generate import Shop

CATALOGUE = Catalogue(
    pa.table({"intent_id": ["a", "b", "c"], "title": ["A", "B", "C"], "category": ["x", "x", "x"]}),
)


def log(**columns: list) -> pa.Table:
    return pa.table(
        {
            "session_id": ["s0", "s1"],
            "user_id": ["u0", "u1"],
            "candidates": [["c", "a"], ["a", "b", "c"]],
            "clicks": [[True, False], [False, False, True]],
            "position": pa.array([[0, -1], [1, -1, 0]], pa.list_(pa.int16())),
            "propensity": pa.array([[0.5, 0.0], [0.4, 0.0, 0.2]], pa.list_(pa.float32())),
        }
        | columns
    )


def test_slates_stand_in_the_order_of_their_positions() -> None:
    found = logged_slates.read(log(), CATALOGUE)
    assert found.candidates.tolist() == [[2, 0, -1], [0, 1, 2]]
    assert found.shown.tolist() == [[0, -1], [2, 0]]
    assert found.propensity == pytest.approx(np.array([[0.5, 0.0], [0.2, 0.4]]))
    assert found.clicks.tolist() == [[True, False], [True, False]]
    assert list(found.users) == ["u0", "u1"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"position": [[0, -1], [1, -1, 1]]}, "'s1' shows two"),
        ({"position": [[-1, -1], [1, -1, 0]]}, "'s0' has none"),
        ({"position": [None, [1, -1, 0]]}, "'s0' has none"),
        ({"propensity": [None, [0.4, 0.0, 0.2]]}, "position 0 of row 0"),
    ],
)
def test_what_cannot_be_evaluated_is_named(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        logged_slates.read(log(**columns), CATALOGUE)


def test_a_log_without_propensities_is_refused() -> None:
    with pytest.raises(DataError, match="no column 'propensity'"):
        logged_slates.read(log().drop_columns("propensity"), CATALOGUE)


def test_the_shops_own_slates_have_weights_of_mean_1_under_its_old_ranker() -> None:
    shop = Shop(config.World(sessions=3000, users=1500, days=8, seed=1))
    size = int(shop.sessions_of_day[2])
    table, _, clicked = shop.make(2, 0, size, lambda users, ts: np.zeros(len(users), dtype=int))
    sets = pa.table({"candidate_set": ["all"], "intents": [list(kb.index())]})
    slates = logged_slates.read(table, Catalogue(kb.intents(), sets))
    assert slates.clicks.any(axis=1).sum() == clicked
    with np.errstate(divide="ignore"):
        logits = plackett_luce.logits(np.log(shop.old_weights(2, 0, size)), slates.mask)
    weights = policy_value.prefix_weights(slates, logits)
    assert weights.max() <= 1 / 0.95 + 1e-4  # the mixture's own share of the old ranker's slates
    assert weights.mean(axis=0) == pytest.approx(np.ones(3), abs=0.05)
