from __future__ import annotations

from itertools import combinations

import numpy as np

from rgalign_ray import schema
from rgalign_ray.world import events, kb, needs, texts
from rgalign_ray.world.draws import Draws

CATEGORIES = {"order", "delivery", "payment", "return", "refund", "account", "promotion", "seller", "product"}


def test_intents_are_a_table_sorted_by_id():
    table = kb.intents()
    schema.check(table.schema, schema.INTENTS, "intents")
    ids = table["intent_id"].to_pylist()
    assert ids == sorted(set(ids)) and len(ids) >= 80
    assert set(table["category"].to_pylist()) == CATEGORIES
    titles = table["title"].to_pylist()
    assert len(set(titles)) == len(titles)
    assert titles[kb.index()["speed_up_parcel_delivery"]] == "Speed up parcel delivery"


def test_relevance_is_a_symmetric_graph_of_near_duplicates():
    relevance = kb.relevance()
    assert np.array_equal(relevance, relevance.T)
    assert np.all(np.diag(relevance) == 1.0)
    assert set(np.unique(relevance)) == {0.0, 0.5, 1.0}


def test_every_need_follows_from_some_situation_and_leaves_two_signals():
    assert np.all(needs.links().sum(axis=0) >= 1)
    assert np.all(needs.links().sum(axis=1) >= 1)
    assert all(len(set(intent.signals)) == 2 for intent in kb.entries())


def test_wording_sets_share_no_phrase():
    phrases = [
        {phrase for i in range(len(kb.entries())) for c in range(3) for phrase in texts.phrases(i, c, wording)}
        for wording in range(3)
    ]
    assert all(len(found) >= 2 * len(kb.entries()) for found in phrases)
    assert all(not a & b for a, b in combinations(phrases, 2))


def test_written_texts_of_the_sets_share_no_string_and_fill_their_slots():
    about = np.repeat(np.arange(len(kb.entries())), 30)
    keys = np.arange(len(about), dtype=np.uint64)
    channel = keys.astype(int) % len(events.CHANNELS)
    written = [set(texts.write(Draws(3), keys, about, channel, np.full(len(about), w)).to_pylist()) for w in range(3)]
    assert all(not a & b for a, b in combinations(written, 2))
    assert not any("{" in text for found in written for text in found)


def test_texts_are_their_phrases_with_the_slots_filled():
    rng = np.random.default_rng(0)
    about, channel, wording = (rng.integers(size, size=3000) for size in (len(kb.entries()), 3, 3))
    keys = np.arange(3000, dtype=np.uint64)
    u = Draws(3).uniform("text", keys, texts.UNIFORMS)
    for row, found in enumerate(texts.write(Draws(3), keys, about, channel, wording).to_pylist()):
        choices = texts.phrases(about[row], channel[row], wording[row])
        phrase = choices[int(u[row, 0] * len(choices))]
        filled = {name: by[wording[row]] for name, (_, by) in texts.SLOTS.items()}
        filled = {name: filled[name][int(u[row, texts.SLOTS[name][0]] * len(filled[name]))] for name in filled}
        expected = phrase.format(**filled)
        if channel[row] == events.CHAT:
            expected = filled["opening"] + expected + filled["ending"]
        assert found == expected
