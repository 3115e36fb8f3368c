from __future__ import annotations

import re
import zlib
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config, schema, storage
from rgalign_ray.config import Config
from rgalign_ray.logs.features import FeatureSpace, FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.logs.roles import role_of
from rgalign_ray.loop import log_stages
from rgalign_ray.loop.stage import Run
from rgalign_ray.world import kb
from rgalign_ray.world.generate import Shop, generate

SIZE = len(kb.entries())
LISTS = ("shown", "clicks", "resolved", "position", "propensity")


def training_words(users: list[str], ts: np.ndarray) -> np.ndarray:
    return np.zeros(len(users), dtype=int)


def settings(**changes) -> config.World:
    return config.World(**{"sessions": 600, "users": 300, "days": 3, "seed": 4, **changes})


def read(uri: str) -> tuple[pa.Table, pa.Table]:
    return tuple(storage.read_table(storage.join(uri, name)).sort_by("session_id") for name in ("sessions", "truth"))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("shop"))
    days = []
    rows = generate(settings(), uri, wording_of=training_words, on_day=days.append, test_days=1)
    return uri, rows, days


@pytest.fixture(scope="module")
def sessions(log) -> pa.Table:
    return read(log[0])[0]


def matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].combine_chunks().flatten()).reshape(len(table), SIZE)


def test_tables_follow_their_schemas(log, sessions):
    uri, rows, days = log
    schema.check(sessions.schema, schema.SESSIONS, "sessions", extra=True)
    optional = pa.schema([schema.SESSIONS_OPTIONAL.field(n) for n in ("candidate_set", *LISTS[2:])])
    schema.check(sessions.schema, optional, "sessions", extra=True)
    schema.check(storage.read_table(f"{uri}/intents.parquet").schema, schema.INTENTS, "intents")
    sets = storage.read_table(f"{uri}/candidate_sets.parquet")
    schema.check(sets.schema, schema.CANDIDATE_SETS, "candidate_sets")
    assert sets["intents"].to_pylist() == [list(kb.index())]
    assert rows["sessions"] == rows["truth"] == sum(days) == len(sessions) == 600 and len(days) == 3
    assert len(set(sessions["session_id"].to_pylist())) == 600


def test_the_log_has_the_features_and_texts_of_the_packaged_specs(sessions):
    spec = FeatureSpec.load("shop")
    spec.check(sessions.schema, "shop")
    assert len(spec.fields) == 89
    template = Template.load("shop")
    texts = template.sessions(sessions)
    assert len(set(texts)) == len(texts)
    assert any(re.match(r"order To Receive, delayed, (7|8|9|1\d) days; ", text) for text in texts)


def test_files_lie_by_day_and_region(log):
    files = storage.list_files(f"{log[0]}/sessions", ".parquet")
    assert f"{log[0]}/sessions/dt=2026-01-05/region=ID/part-00000.parquet" in files
    day = storage.read_table(f"{log[0]}/sessions/dt=2026-01-06")
    assert {str(ts)[:10] for ts in day["ts"].to_pylist()} == {"2026-01-06"}


def test_slates_clicks_and_propensities_agree(sessions):
    shown, clicks, resolved, position, propensity = (matrix(sessions, name) for name in LISTS)
    assert np.all(shown.sum(axis=1) == 3)
    assert not np.any(clicks & ~shown) and not np.any(resolved & ~clicks)
    assert np.array_equal(position >= 0, shown)
    assert np.array_equal(np.sort(position, axis=1)[:, -3:], np.tile([0, 1, 2], (len(shown), 1)))
    assert np.all((propensity[shown] > 0) & (propensity[shown] <= 1)) and not np.any(propensity[~shown])


def test_everything_dates_from_before_the_entry(sessions):
    for ts, history in zip(sessions["ts"].to_pylist(), sessions["history"].to_pylist(), strict=True):
        times = [event["ts"] for event in history]
        assert times == sorted(times) and times[-1] < ts


def test_an_event_planted_after_the_entry_reaches_neither_features_nor_prompt(sessions):
    late = {"event": "view_refund_page", "text": "give me my money back", "ts": None}
    planted = [
        [*history, late | {"ts": ts + timedelta(microseconds=1)}]
        for ts, history in zip(sessions["ts"].to_pylist(), sessions["history"].to_pylist(), strict=True)
    ]
    place = sessions.column_names.index("history")
    leaky = sessions.set_column(place, "history", pa.array(planted, pa.list_(schema.EVENT)))
    early = [[late | {"ts": history[0]["ts"]}, *history] for history in sessions["history"].to_pylist()]
    seen = sessions.set_column(place, "history", pa.array(early, pa.list_(schema.EVENT)))
    space, template = FeatureSpace.fit(FeatureSpec.load("shop"), [leaky]), Template.load("shop")
    for name, values in space.transform(sessions).items():
        assert np.array_equal(space.transform(leaky)[name], values), name
    assert template.sessions(leaky) == template.sessions(sessions)
    assert not np.array_equal(space.transform(seen)["history"], space.transform(sessions)["history"])
    assert template.sessions(seen) != template.sessions(sessions)  # the same event, had it come in time


def test_roles_share_no_wording(tmp_path):
    settings = Config.model_validate({"world": {"sessions": 1200, "users": 400, "days": 10}, "run_dir": str(tmp_path)})
    log_stages.make_shop(Run(settings), str(tmp_path))
    table = storage.read_table(f"{tmp_path}/sessions")
    ts, last_day = table["ts"].to_numpy(), log_stages.last_day(settings)
    roles = role_of(table["user_id"].to_pylist(), ts, settings.roles, settings.rounds, last_day)
    texts: dict[str, set[str]] = {}
    for role, history in zip(roles, table["history"].to_pylist(), strict=True):
        texts.setdefault(role, set()).update(event["text"] for event in history if event["text"])
    assert all(len(texts[role]) > 50 for role in ("rank", "align_1", "valid", "test"))
    for role in ("rank", "align_1"):
        assert not texts[role] & texts["valid"] and not texts[role] & texts["test"]
    assert not texts["valid"] & texts["test"] and texts["rank"] & texts["align_1"]


def test_the_log_is_a_function_of_the_settings_whatever_the_chunks(log, tmp_path):
    generate(settings(), str(tmp_path), wording_of=training_words, test_days=1, chunk_sessions=80)
    for again, first in zip(read(str(tmp_path)), read(log[0]), strict=True):
        assert again.select(sorted(again.column_names)).equals(first.select(sorted(first.column_names)))


def test_the_default_world_is_frozen():
    sessions, truth, clicked = Shop(config.World()).make(20, 0, 50, training_words)
    assert sessions["session_id"][0].as_py() == "s40f5483566543b6e"
    assert zlib.crc32("".join(truth["need"].to_pylist()).encode()) == 32971632
    assert clicked == 17
    assert np.flatnonzero(matrix(sessions, "clicks"))[:8].tolist() == [92, 294, 588, 797, 935, 1043, 1074, 1164]


def test_another_seed_is_another_world():
    one, other = (Shop(settings(seed=seed)).make(0, 0, 50, training_words)[1] for seed in (1, 2))
    assert not set(one["session_id"].to_pylist()) & set(other["session_id"].to_pylist())


def test_wordings_are_those_asked_for():
    shop = Shop(settings())
    written = [
        {
            event["text"]
            for history in shop.make(1, 0, 100, lambda users, ts, w=w: np.full(len(users), w))[0]["history"].to_pylist()
            for event in history
            if event["text"]
        }
        for w in range(3)
    ]
    assert all(written)
    assert not written[0] & written[1] and not written[0] & written[2] and not written[1] & written[2]


@pytest.mark.parametrize("clicks", ["position", "cascade"])
@pytest.mark.parametrize("seed", [0, 1])
def test_about_three_sessions_in_ten_have_a_click(seed, clicks):
    world = settings(sessions=6000, users=4000, seed=seed, clicks=clicks)
    table, _, clicked = Shop(world).make(1, 0, 1900, training_words)
    assert 0.24 < clicked / len(table) < 0.36


def test_cold_intents_occur_in_the_test_period_alone():
    shop = Shop(settings(sessions=9000, cold_share=0.3), test_days=1)
    cold = shop.needs.cold
    ids = np.array(list(kb.index()))
    assert cold.sum() == round(0.3 * SIZE)
    for day, expected in ((1, False), (2, True)):
        table, truth, _ = shop.make(day, 0, 1500, training_words)
        assert np.any(matrix(table, "shown")[:, cold]) == expected
        assert bool(set(truth["need"].to_pylist()) & set(ids[cold])) == expected
        moments = shop.entries(day, 0, 1500).moments
        assert np.any(cold[moments.about[moments.happened]]) == expected


def test_a_week_in_to_receive_makes_users_want_the_parcel_sooner():
    table, truth, _ = Shop(settings(sessions=30_000, users=20_000)).make(1, 0, 9000, training_words)
    wanted = np.array(truth["need"].to_pylist()) == "speed_up_parcel_delivery"
    waits = (np.array(table["order_tab"].to_pylist()) == "To Receive") & (table["order_days_in_tab"].to_numpy() >= 7)
    assert waits.sum() > 50
    assert wanted[waits].mean() > 5 * wanted.mean()
