"""What FuxiCTR is given says the same as what our ranker reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from logs_data import INTENTS, SPEC, event, session, table

from benchmarks import din_rgalign, peer, ranker_vs_fuxictr
from rgalign_ray import config
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.features import FeatureSpace

SESSIONS = table(
    session(0, status="paid", days_late=1.0, history=[event("order", 9), event("refund", 5), event("unheard", 1)]),
    session(1, status="lost", tags=["hub"], candidates=["refund", "cancel"], shown=[True] * 2, clicks=[False, True]),
    session(2, status=None, days_late=None, tags=None, history=[]),
)


@pytest.fixture
def written(tmp_path: Path):
    space = FeatureSpace.fit(SPEC, [SESSIONS.slice(0, 1), table(session(3))], 4)
    space = FeatureSpace.from_dict(space.to_dict() | {"events": ["order", "refund", "track"]})
    catalogue = Catalogue(INTENTS)
    rows = examples(SESSIONS, space, catalogue)
    parts = {"train": rows, "valid": {name: values[:1] for name, values in rows.items()}, "test": rows}
    peer.write(tmp_path, parts, space, catalogue)
    return tmp_path, rows, space, catalogue


def test_pairs_carry_fields_labels_and_candidates(written) -> None:
    folder, rows, space, catalogue = written
    train = pq.read_table(folder / "train.parquet").to_pydict()
    assert train["session"] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert train["click"] == [1, 0, 0, 0, 1, 1, 0, 0]
    assert train["field_0"] == rows["fields"][train["session"], 0].tolist()
    assert train["field_1"] == (rows["fields"][train["session"], 1] - space._sizes[0]).tolist()
    assert train["multi_0"] == rows["multi"][train["session"], 0].tolist()
    assert len(set(train["item_index"])) == catalogue.size
    assert train["item_index"][:3] == train["item_index"][5:], "the same candidates are the same items"


def test_an_event_that_is_an_intent_is_one_item_and_the_history_has_no_padding(written) -> None:
    folder, _, _, _ = written
    test = pq.read_table(folder / "test.parquet").to_pydict()
    histories = pq.read_table(folder / "user_info.parquet")["full_item_seq"].to_pylist()
    assert len(histories) == 3 + 1 + 3
    first = histories[test["user_index"][0]]
    refund = test["item_index"][SESSIONS["candidates"][0].as_py().index("refund")]
    assert len(first) == 3 and first[1] == refund and first[2] == 1, "an unknown event is item 1"
    assert histories[test["user_index"][-1]] == [] and test["seq_len"][-1] == 0


def test_every_id_has_a_row_in_its_table(written) -> None:
    folder, _, space, _ = written
    listed = json.loads((folder / "feature_map.json").read_text())["features"]
    features = {name: spec for one in listed for name, spec in one.items()}
    train = pq.read_table(folder / "train.parquet").to_pydict()
    for name in ("field_0", "field_1"):
        assert min(train[name]) >= 0 and max(train[name]) < features[name]["vocab_size"]
    assert np.max(train["multi_0"]) < features["multi_0"]["vocab_size"] == space.multi_size
    items = pq.read_table(folder / "item_info.parquet")["item_index"].to_pylist()
    assert items == list(range(features["item_id"]["vocab_size"]))
    assert max(train["item_index"]) < len(items)


def test_our_contenders_train_on_what_the_driver_prepares(tmp_path: Path) -> None:
    overrides = [
        "world.sessions=400",
        "world.users=200",
        "ranker.epochs=1",
        "ranker.dim=8",
        "roles.rank=0.4",
        "roles.test=0.53",
    ]
    place = ranker_vs_fuxictr._prepare("shop", tmp_path, config.load("ladder", overrides))
    settings = json.loads((place / "settings.json").read_text())
    test = np.load(place / "test.npz")
    for pointwise in (False, True):
        out = tmp_path / f"{pointwise}.json"
        din_rgalign.train(place, 0, out, pointwise)
        result = json.loads(out.read_text())
        assert 0 < result["samples"] == settings["pairs"]["train"]
        assert (result["samples_read"] == result["samples"]) == pointwise, "ListNet passes over what teaches it nothing"
        assert 0 < result["valid_gauc"] < 1
        scores = np.load(out.with_suffix(".npy"))
        assert scores.shape == test["groups"].shape == test["labels"].shape == (settings["pairs"]["test"],)
        assert np.isfinite(scores).all()
