"""The reward model judges many queries at once as it would judge each alone."""

from __future__ import annotations

import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_data import rows, sizes

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.roles import fold_of
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.batches import to_batch
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.reward import functions
from rgalign_ray.reward.actor import RewardModel
from rgalign_ray.reward.judging import query_scores

SETTINGS = config.Ranker(dim=8, heads=2, attention_layers=2, whitened_dim=8)
DIM, N, INTENTS = 12, 3, [f"i{i}" for i in range(7)]
SESSIONS = ["s3", "s1", "s2", "s4", "s0"]  # in no order


def random_ranker(of: Sizes, seed: int) -> QERec:
    """A ranker none of whose weights is zero, so that it listens to every input."""
    torch.manual_seed(seed)
    model = QERec(of, SETTINGS)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ranker() -> QERec:
    return random_ranker(sizes(dim=DIM), seed=0)


@settings(deadline=None, max_examples=15)
@given(sessions=st.integers(1, 4), queries=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_queries_at_once_equal_one_by_one_and_the_last_is_the_null_query(
    ranker: QERec, sessions: int, queries: int, seed: int
) -> None:
    data = rows(sizes(dim=DIM), sessions, seed=seed)
    data["candidates"][0, 4:] = -1
    batch = to_batch({name: data[name] for name in ("fields", "multi", "history", "candidates", "shown", "clicks")})
    embeddings = torch.from_numpy(np.random.default_rng(seed).normal(size=(sessions, queries, DIM)).astype(np.float32))
    scores = query_scores(ranker, batch, embeddings)
    assert scores.shape == (sessions, queries + 1, data["candidates"].shape[1])
    there = data["candidates"] >= 0
    for n in range(queries):
        alone = query_scores(ranker, batch, embeddings[:, n : n + 1])
        np.testing.assert_allclose(alone[:, 0], scores[:, n], atol=1e-4)
        np.testing.assert_allclose(ranker(batch, embeddings[:, n]).numpy()[there], scores[:, n][there], atol=1e-4)
    null = ranker(batch, embeddings[:, 0], torch.ones(sessions, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(null[there], scores[:, -1][there], atol=1e-4)
    np.testing.assert_allclose(ranker(batch).numpy()[there], null[there], atol=1e-4)
    assert np.abs(scores[:, 0] - scores[:, -1]).max() > 1e-3, "this ranker listens to queries"


def sessions_table(ids: list[str] = SESSIONS) -> pa.Table:
    """Ragged candidates; s4 has no click."""
    table = []
    for session in ids:
        number = int(session[1:])
        width = 3 + number % 4
        clicks = [place == number % 3 and session != "s4" for place in range(width)]
        table.append(
            {
                "session_id": session,
                "ts": datetime.datetime(2026, 1, 1),
                "tier": f"t{number % 2}",
                "history": [],
                "candidates": INTENTS[:width][::-1],
                "shown": [True] * width,
                "clicks": clicks,
            }
        )
    types = [*schema.SESSIONS, ("candidates", pa.list_(pa.string())), ("tier", pa.string())]
    known = [field for field in pa.schema(types) if field.name in table[0]]
    return pa.Table.from_pylist(table, schema=pa.schema(known))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log and two judges of it, beside one of another catalogue."""
    root = tmp_path_factory.mktemp("reward")
    intents = dict.fromkeys(("intent_id", "title", "description", "category"), INTENTS)
    storage.write_table(str(root / "log/intents.parquet"), pa.table(intents, schema=schema.INTENTS))
    spec = FeatureSpec.model_validate({"fields": [{"name": "tier", "kind": "categorical"}], "min_count": 1})
    space = FeatureSpace.fit(spec, [sessions_table()])
    for name, ids in (("a", INTENTS), ("b", INTENTS), ("foreign", [*INTENTS, "more"])):
        of = Sizes.of(space, num_intents=len(ids), embedding_dim=DIM, item_dim=0)
        model = random_ranker(of, seed=ord(name[0]))
        meta = scoring.meta_of(model, space=space.to_dict(), intent_ids=ids, reasoner_version="r0", seed=0, figures={})
        scoring.save(model, str(root / name), meta)
    return root


def reward_model(place: Path, names: str = "a b", **changes: object) -> RewardModel:
    threads = torch.get_num_threads()
    try:
        rankers = [[str(place / name) for name in folds] for folds in names.split()]
        return RewardModel(rankers, str(place / "log"), config.Reward(**changes))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


def unit(
    folder: Path, ids: list[str] = SESSIONS, faults: dict | None = None, version: str = "r0"
) -> tuple[str, str, np.ndarray]:
    """The two files of a unit, sessions in the order given, and its query embeddings [S, N, De] by sorted id."""
    vectors = np.random.default_rng(5).normal(size=(len(ids), N + 1, DIM)).astype(np.float16)
    rollouts, embedded = [], []
    for row, session in sorted(enumerate(sorted(ids)), key=lambda pair: ids.index(pair[1])):
        embedded.append((session, "prompt", -1, None, vectors[row, N]))
        for sample in range(N):
            fault = (faults or {}).get((session, sample))
            if fault == "non_finite":
                vectors[row, sample] = np.inf
            query = f"{session}/{sample}"
            rollouts.append({"session_id": session, "sample": sample, "query": query, "fault": fault})
            embedded.append((session, "query", sample, query, vectors[row, sample]))
    storage.write_table(str(folder / "rollouts.parquet"), pa.Table.from_pylist(rollouts, schema=schema.ROLLOUTS))
    kinds = schema.embeddings(DIM)
    *columns, last = zip(*embedded, strict=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(last)), DIM)
    columns.append([version] * len(embedded))
    arrays = [pa.array(list(values), kind.type) for values, kind in zip(columns, kinds, strict=False)]
    storage.write_table(str(folder / "embeddings.parquet"), pa.table([*arrays, flat], schema=kinds))
    return str(folder / "rollouts.parquet"), str(folder / "embeddings.parquet"), vectors[:, :N]


def values(column: pa.ChunkedArray) -> np.ndarray:
    """nan where it is null."""
    return column.to_numpy(zero_copy_only=False)


@pytest.mark.parametrize("kind", ["logprob", "ndcg"])
def test_a_unit_is_judged_as_each_query_would_be_alone(place: Path, tmp_path: Path, kind: str) -> None:
    *files, vectors = unit(tmp_path)
    model = reward_model(place, kind=kind, k=2)
    reward = functions.logprob if kind == "logprob" else partial(functions.ndcg, k=2)
    scored = model.score(sessions_table(), *files)
    schema.check(scored.schema, schema.SCORED, "scored")
    assert scored["session_id"].to_pylist() == [i for i in sorted(SESSIONS) for _ in range(N)]
    assert scored["sample"].to_pylist() == list(range(N)) * len(SESSIONS)
    assert scored["query"].to_pylist() == [f"{s}/{n}" for s in sorted(SESSIONS) for n in range(N)]
    assert scored["ranker_version"].unique().to_pylist() == [model.judges[0][0].meta.version]
    for column, (judge,) in zip(("reward", "second"), model.judges, strict=True):
        for row, session in enumerate(sorted(SESSIONS)):
            batch = examples(sessions_table([session]), judge.space, Catalogue.load(str(place / "log")))
            mask = batch["candidates"] >= 0
            rewards = []
            for vector in [*vectors[row], None]:
                given = None if vector is None else torch.from_numpy(vector[None].astype(np.float32))
                scores = judge.model(to_batch(batch), given).numpy()[:, None]
                rewards.append(float(reward(scores, batch["clicks"], mask)[0, 0]))
            part = scored.slice(row * N, N)
            np.testing.assert_allclose(part[column].to_numpy(), rewards[:-1], atol=1e-4)
            if column == "reward":
                np.testing.assert_allclose(part["uplift"].to_numpy(), np.array(rewards[:-1]) - rewards[-1], atol=1e-4)
    assert scored["reward"].null_count == N, "no click, no reward"


@pytest.mark.parametrize("kind", ["logprob", "ndcg"])
def test_a_faulty_query_gets_no_reward_and_spoils_no_other(place: Path, tmp_path: Path, kind: str) -> None:
    faults = {("s1", 0): "loop", ("s2", 2): "non_finite", ("s2", 1): "empty"}
    whole = reward_model(place, kind=kind).score(sessions_table(), *unit(tmp_path)[:2])
    scored = reward_model(place, kind=kind).score(sessions_table(), *unit(tmp_path, faults=faults)[:2])
    for row, (session, sample) in enumerate((s, n) for s in sorted(SESSIONS) for n in range(N)):
        found = scored.slice(row, 1).to_pylist()[0]
        fault = faults.get((session, sample))
        assert (found["valid"], found["reason"]) == (fault is None, fault)
        if fault is None:
            assert found == whole.slice(row, 1).to_pylist()[0]
        else:
            assert {found[name] for name in ("reward", "uplift", "second")} == {None}


def test_judges_are_asked_as_the_reward_says(place: Path, tmp_path: Path) -> None:
    *files, _ = unit(tmp_path)
    by_log, by_click = (reward_model(place, rank_by=by) for by in ("log", "click"))
    (judge,) = by_click.judges[0]
    assert judge.model.tower_weight == pytest.approx(float(judge.model.shown_weight)) != 1
    whole = sessions_table()
    shown = pa.array([[place < 3 for place in range(len(row))] for row in whole["candidates"].to_pylist()])
    part = whole.set_column(whole.schema.get_field_index("shown"), "shown", shown)
    (log, click), (log_of_few, click_of_few) = (
        [model.score(table, *files)["reward"].to_numpy() for model in (by_log, by_click)] for table in (whole, part)
    )
    assert np.nanmax(np.abs(log - click)) > 1e-3
    np.testing.assert_array_equal(log, log_of_few)
    wide = np.repeat([session != "s0" for session in sorted(SESSIONS)], N) & ~np.isnan(click)
    assert (click_of_few[wide] > click[wide]).all(), "a click is likelier among fewer"
    np.testing.assert_array_equal(click_of_few[:N], click[:N])


def test_a_query_that_says_nothing_more_than_none_has_no_uplift(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = QERec.queries

    def deaf(self: QERec, embedding: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
        second = torch.arange(is_null.shape[1]) == 1
        return heard(self, embedding, is_null | second)

    monkeypatch.setattr(QERec, "queries", deaf)
    scored = reward_model(place).score(sessions_table(), *unit(tmp_path)[:2])
    uplift = values(scored["uplift"]).reshape(-1, N)
    clicked = ~np.isnan(uplift).all(axis=1)
    assert clicked.sum() == len(SESSIONS) - 1
    np.testing.assert_allclose(uplift[clicked, 1], 0.0, atol=1e-6)
    assert (np.abs(uplift[clicked][:, [0, 2]]) > 1e-4).all()


def test_each_fold_of_users_is_judged_by_the_ranker_that_has_not_seen_it(place: Path, tmp_path: Path) -> None:
    files = unit(tmp_path)[:2]
    table = sessions_table()
    table = table.append_column("user_id", pa.array([f"user-{i}" for i in range(len(table))]))
    fold = fold_of(table.sort_by("session_id")["user_id"].to_pylist(), 2)
    assert set(fold) == {0, 1}, "both folds have a session"
    crossed = reward_model(place, "ab ba").score(table, *files)
    alone = [reward_model(place, f"{name} {name}").score(table, *files) for name in "ab"]
    for row, number in enumerate(fold):
        found, own, other = (it.slice(row * N, N) for it in (crossed, alone[number], alone[1 - number]))
        assert found["ranker_version"].equals(own["ranker_version"])
        for column, expected in (("reward", own["reward"]), ("uplift", own["uplift"]), ("second", other["reward"])):
            np.testing.assert_allclose(values(found[column]), values(expected), atol=1e-6)


def test_of_several_judges_the_mean_is_the_reward_and_the_last_measures_it(place: Path, tmp_path: Path) -> None:
    files = unit(tmp_path)[:2]
    a, b = (reward_model(place, f"{name} {name}").score(sessions_table(), *files) for name in "ab")
    scored = reward_model(place, "a b a").score(sessions_table(), *files)
    np.testing.assert_array_equal(values(scored["second"]), values(a["reward"]))
    for name in ("reward", "uplift"):
        found, one, other = (values(table[name]) for table in (scored, a, b))
        np.testing.assert_allclose(found, (one + other) / 2, atol=1e-5)
    versions = "+".join(each["ranker_version"][0].as_py() for each in (a, b))
    assert scored["ranker_version"].unique().to_pylist() == [versions]


def test_inputs_of_another_kind_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reasoner 'r1'"):
        reward_model(place).score(sessions_table(), *unit(tmp_path, version="r1")[:2])
    with pytest.raises(DataError, match="catalogue"):
        RewardModel([[str(place / "a")], [str(place / "foreign")]], str(place / "log"), config.Reward())
    rollouts, _, _ = unit(tmp_path)
    (tmp_path / "other").mkdir()
    _, embeddings, _ = unit(tmp_path / "other", SESSIONS[:2])
    with pytest.raises(AssertionError, match="not of"):
        reward_model(place).score(sessions_table(), rollouts, embeddings)
