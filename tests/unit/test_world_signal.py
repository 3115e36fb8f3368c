"""Where the signal about the need lies: `text_share` divides it between typed features and texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from rgalign_ray import config
from rgalign_ray.world import kb
from rgalign_ray.world.generate import Shop

TRAIN = 4000
CHANCE = 0.03
"""How far above the base rate a classifier may stray on 2000 sessions without knowing anything."""


def lift(text_share: float) -> tuple[float, float]:
    """Accuracy on the need's category beyond its base rate: (bag of words of the texts, typed features)."""
    shop = Shop(config.World(sessions=12_000, users=9000, days=2, text_share=text_share, seed=1))
    table, truth, _ = shop.make(0, 0, 6000, lambda users, ts: np.zeros(len(users), dtype=int))
    category = np.array([kb.entries()[kb.index()[need]].category for need in truth["need"].to_pylist()])
    documents = [
        " ".join(event["text"] for event in history if event["text"]) for history in table["history"].to_pylist()
    ]
    words = CountVectorizer().fit_transform(documents)
    typed = DictVectorizer().fit_transform(typed_features(table).to_pylist())
    base = np.unique(category[TRAIN:], return_counts=True)[1].max() / len(category[TRAIN:])

    def accuracy(x) -> float:
        return MultinomialNB().fit(x[:TRAIN], category[:TRAIN]).score(x[TRAIN:], category[TRAIN:])

    return accuracy(words) - base, accuracy(typed) - base


def typed_features(table: pa.Table) -> pa.Table:
    names = [n for n in table.column_names if n.startswith("n_") or pa.types.is_string(table.schema.field(n).type)]
    return table.select([name for name in names if name not in ("session_id", "user_id", "candidate_set")])


@pytest.mark.parametrize("text_share", [0.0, 1.0])
def test_the_signal_lies_where_text_share_puts_it(text_share):
    by_text, by_type = lift(text_share)
    knows, ignorant = (by_text, by_type) if text_share == 1.0 else (by_type, by_text)
    assert knows > 0.2
    assert ignorant < CHANCE


def test_at_the_default_both_know_something():
    assert min(lift(0.5)) > 0.05
