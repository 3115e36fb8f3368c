"""Artefacts, versions and embeddings by session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ranker_data import rows, sizes

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.baselines.two_tower import TwoTower
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.qe_rec import QERec

SIZES = sizes()
SETTINGS = config.Ranker(dim=8, heads=2)


@pytest.fixture(scope="module")
def space() -> FeatureSpace:
    spec = FeatureSpec.model_validate({"fields": [{"name": "tier", "kind": "categorical"}]})
    columns = {"tier": ["a", "b"] * 4, "ts": pa.array([None] * 8, schema.TIMESTAMP)}
    return FeatureSpace.fit(spec, [pa.table(columns | {"history": pa.array([[]] * 8, pa.list_(schema.EVENT))})])


def _table(ids: list[str], readout: str, sample: list[int] | None = None, version: str = "r0") -> pa.Table:
    draw = np.random.default_rng(len(ids))
    flat = draw.normal(size=len(ids) * SIZES.embedding_dim).astype(np.float16)
    return pa.table(
        [
            pa.array(ids),
            pa.array([readout] * len(ids)),
            pa.array(sample or [-1] * len(ids), pa.int32()),
            pa.array([None] * len(ids), pa.string()),
            pa.array([version] * len(ids)),
            pa.FixedSizeListArray.from_arrays(pa.array(flat), SIZES.embedding_dim),
        ],
        schema=schema.embeddings(SIZES.embedding_dim),
    )


def _saved(tmp_path: Path, space: FeatureSpace, kind: type = QERec) -> scoring.LoadedRanker:
    torch.manual_seed(0)
    model = kind(SIZES, SETTINGS)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.3)
    ids = [f"i{i}" for i in range(SIZES.num_intents)]
    meta = scoring.meta_of(
        model, space=space.to_dict(), intent_ids=ids, reasoner_version="r0", seed=0, figures={"best_gauc": 0.5}
    )
    saved = scoring.save(model, str(tmp_path / "ranker"), meta)
    loaded = scoring.load(str(tmp_path / "ranker"))
    assert loaded.meta == saved
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    return loaded


def _examples(n: int = 9) -> dict:
    data = rows(SIZES, n)
    ids = [f"s{i}" for i in range(n)]
    names = ("fields", "multi", "history", "candidates", "shown", "clicks")
    return {**{name: data[name] for name in names}, "session_key": session_keys(ids), "session_id": ids}


@pytest.mark.parametrize("kind", [QERec, TwoTower])
def test_a_loaded_ranker_scores_in_batches_as_at_once(tmp_path: Path, space: FeatureSpace, kind: type) -> None:
    ranker = _saved(tmp_path, space, kind)
    batch = _examples()
    embeddings = Embeddings.of(_table(batch["session_id"], "prompt"))
    options = {"space_version": space.version, "embeddings": embeddings}
    whole = scoring.score_sessions(ranker, batch, **options)
    assert whole.shape == batch["candidates"].shape
    np.testing.assert_allclose(scoring.score_sessions(ranker, batch, **options, batch_size=2), whole, atol=1e-5)
    assert not any(p.requires_grad for p in ranker.model.parameters())


def test_readouts_fall_back_from_query_to_prompt_to_null(tmp_path: Path, space: FeatureSpace) -> None:
    ranker = _saved(tmp_path, space)
    batch = _examples()
    ids = batch["session_id"]
    table = pa.concat_tables([_table(ids[:6], "prompt"), _table(ids[:3], "query", [0] * 3)])
    options = {"space_version": space.version, "embeddings": Embeddings.of(table)}
    query, prompt, null = (
        scoring.score_sessions(ranker, batch, readout=readout, **options) for readout in ("query", "prompt", "null")
    )
    assert (np.abs(query - prompt).max(axis=1) > 1e-4).tolist() == [True] * 3 + [False] * 6
    assert (np.abs(prompt - null).max(axis=1) > 1e-4).tolist() == [True] * 6 + [False] * 3
    np.testing.assert_array_equal(scoring.score_sessions(ranker, batch, space_version=space.version), null)


def test_other_versions_are_refused(tmp_path: Path, space: FeatureSpace) -> None:
    ranker = _saved(tmp_path, space)
    batch = _examples()
    other = Embeddings.of(_table(batch["session_id"], "prompt", version="r1"))
    with pytest.raises(DataError, match="reasoner 'r1'"):
        scoring.score_sessions(ranker, batch, space_version=space.version, embeddings=other)
    with pytest.raises(DataError, match="space 'other'"):
        scoring.score_sessions(ranker, batch, space_version="other")
    with pytest.raises(DataError, match="intents"):
        ranker.require(intent_ids=["a"])
    with pytest.raises(DataError, match="not a ranker"):
        scoring.load(str(tmp_path / "nowhere"))
    place = str(tmp_path / "ranker")
    meta = storage.read_json(storage.join(place, scoring.META))
    meta["settings"]["of_old"] = 1
    storage.write_json(storage.join(place, scoring.META), meta)
    with pytest.raises(DataError, match=r"made by another version; .* settings\.of_old: no such setting"):
        scoring.load(place)


def test_files_of_two_rankers_in_one_folder_are_refused(tmp_path: Path, space: FeatureSpace) -> None:
    _saved(tmp_path / "own", space)
    _saved(tmp_path / "other", space, TwoTower)
    own, other = (str(tmp_path / name / "ranker") for name in ("own", "other"))
    storage.write_bytes(storage.join(own, scoring.WEIGHTS), (tmp_path / "other/ranker" / scoring.WEIGHTS).read_bytes())
    with pytest.raises(DataError, match=r"weights.safetensors is of version \w{16}, but ranker.json names \w{16}"):
        scoring.load(own)
    meta = storage.read_json(storage.join(other, scoring.META))
    meta["space"]["vocabularies"]["tier"].append("c")
    storage.write_json(storage.join(other, scoring.META), meta)
    with pytest.raises(DataError, match="the feature space is of version"):
        scoring.load(other)


def test_weights_of_another_version_of_the_model_are_refused_in_a_sentence(tmp_path: Path, space: FeatureSpace) -> None:
    _saved(tmp_path, space)
    place = str(tmp_path / "ranker")
    meta = storage.read_json(storage.join(place, scoring.META))
    meta["sizes"]["match_dim"] += 1
    storage.write_json(storage.join(place, scoring.META), meta)
    with pytest.raises(
        DataError, match=r"^\S+: its weights are of another version of qe_rec; train the ranker again\.$"
    ):
        scoring.load(place)


def test_lookup_finds_each_id_and_the_first_sample(tmp_path: Path) -> None:
    table = pa.concat_tables([_table(["b", "a"], "prompt"), _table(["a", "a", "c"], "query", [2, 1, 0])])
    storage.write_table(str(tmp_path / "part-00000.parquet"), table.slice(0, 3))
    storage.write_table(str(tmp_path / "part-00001.parquet"), table.slice(3))
    storage.write_json(str(tmp_path / "manifest.json"), {})
    embeddings = Embeddings.load(str(tmp_path))
    storage.write_table(str(tmp_path / "more/part.parquet"), _table(["d"], "prompt"))
    assert Embeddings.load(str(tmp_path), str(tmp_path / "more")).lookup(session_keys(["a", "d"]), "prompt")[1].all()
    vectors = np.array(table["embedding"].to_pylist(), np.float16)
    found, has = embeddings.lookup(session_keys(["a", "x", "b"]), "prompt")
    assert has.tolist() == [True, False, True]
    np.testing.assert_array_equal(found, [vectors[1], np.zeros(SIZES.embedding_dim), vectors[0]])
    np.testing.assert_array_equal(embeddings.lookup(session_keys(["a"]), "query")[0], vectors[[3]])
    assert not embeddings.lookup(session_keys(["a"]), "item")[1].any()
    with pytest.raises(DataError, match="intent 'a' has none"):
        embeddings.items(["a"])


def test_embeddings_of_two_versions_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one reasoner version"):
        Embeddings.of(pa.concat_tables([_table(["a"], "prompt"), _table(["b"], "prompt", version="r1")]))
    with pytest.raises(DataError, match="no embeddings"):
        Embeddings.load(str(tmp_path))
    with pytest.raises(DataError, match="fixed-size list"):
        Embeddings.of(pa.table({"id": ["a"]}))


def test_shuffling_permutes_vectors_across_users() -> None:
    ids = [f"s{i}" for i in range(40)]
    users = [f"u{i // 3}" for i in range(40)]
    original = Embeddings.of(pa.concat_tables([_table(ids, "prompt"), _table(ids[:20], "query")]))
    shuffled = original.shuffled(ids, users, seed=1)
    before, _ = original.lookup(session_keys(ids), "prompt")
    after, found = shuffled.lookup(session_keys(ids), "prompt")
    assert found.all()
    source = [int(np.flatnonzero((before == row).all(axis=1))[0]) for row in after]
    assert sorted(source) == list(range(40))
    assert all(users[i] != users[j] for i, j in enumerate(source))
    query, has = shuffled.lookup(session_keys(ids), "query")
    assert has.sum() == 20
    given = original.lookup(session_keys(ids), "query")[0]
    np.testing.assert_array_equal(query[has], given[np.array(source)[has]])
    np.testing.assert_array_equal(original.shuffled(ids, users, seed=1).lookup(session_keys(ids), "prompt")[0], after)
    with pytest.raises(DataError, match="more than half"):
        original.shuffled(ids, ["u"] * 40, seed=1)


def test_shuffling_gives_every_session_that_was_read_a_vector_of_another() -> None:
    ids = [f"s{i}" for i in range(40)]
    users = [f"u{i // 3}" for i in range(40)]
    partly = Embeddings.of(_table(ids[::3], "prompt"))
    shuffled = partly.shuffled(ids, users, seed=1)
    _, found = shuffled.lookup(session_keys(ids), "prompt")
    assert found.tolist() == [i % 3 == 0 for i in range(40)], "the control reads as many as the row itself"


def test_all_are_moved_by_the_mean_way_to_another_version() -> None:
    ids = [f"s{i}" for i in range(20)]
    before = Embeddings.of(_table(ids, "prompt"))
    known, vectors = before.readouts["prompt"]
    way = np.arange(before.dim, dtype=np.float16)
    either = np.where(np.arange(10) % 2, 1.0, -1.0)[:, None].astype(np.float16)
    after = replace(before, reasoner_version="r1", readouts={"prompt": (known[:10], vectors[:10] + way + either)})
    moved = before.moved_to(after)
    assert moved.reasoner_version == "r1"
    found, has = moved.lookup(session_keys(ids), "prompt")
    own, _ = before.lookup(session_keys(ids), "prompt")
    assert has.all()
    np.testing.assert_allclose((found - own).astype(np.float64), np.tile(way, (20, 1)), atol=0.02)
