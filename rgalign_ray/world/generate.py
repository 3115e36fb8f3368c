"""Writes a log of the simulated shop, day by day, in bounded memory.

Every draw belongs to its session, user or order (see `draws`), so the log is a function of the
`config.World` alone, whatever the size of the chunks in which it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import config, schema, storage
from rgalign_ray.world import clicks, columns, events, exposure, kb, needs, orders, texts, users
from rgalign_ray.world.draws import Draws, pick_rows
from rgalign_ray.world.parameters import FIRST_DAY, PARAMETERS, REGIONS

CHUNK_SESSIONS = 16_384
"""Sessions made at once and written into one file of each region; about 200 MB of memory."""

CANDIDATE_SET = "all"

WEEKDAY_WEIGHTS = (1.05, 1.0, 1.0, 1.0, 1.05, 0.95, 0.95)
HOUR_WEIGHTS = (2, 1, 1, 1, 1, 1, 2, 3, 5, 6, 7, 7, 7, 6, 6, 6, 6, 6, 7, 8, 9, 9, 7, 4)

WordingOf = Callable[[list[str], np.ndarray], np.ndarray]
"""(user ids, ts datetime64[us] [n]) -> int [n]: 0, 1 or 2 where the training, validation or test
wordings are to be used."""


def generate(
    world: config.World,
    uri: str,
    *,
    wording_of: WordingOf,
    on_day: Callable[[int], None] | None = None,
    test_days: int = 7,
    chunk_sessions: int = CHUNK_SESSIONS,
) -> dict[str, int]:
    """Writes intents, candidate_sets, sessions (by dt and region) and truth under `uri`.

    Args:
        on_day: called after each day with the number of its sessions.
        test_days: length of the period at the end in which cold intents occur.

    Returns:
        Rows written, by table, and `sessions_with_click`.
    """
    ids = list(kb.index())
    storage.write_table(storage.join(uri, "intents.parquet"), kb.intents())
    sets = pa.table({"candidate_set": [CANDIDATE_SET], "intents": [ids]}, schema=schema.CANDIDATE_SETS)
    storage.write_table(storage.join(uri, "candidate_sets.parquet"), sets)
    shop = Shop(world, test_days)
    rows = {"intents": len(ids), "candidate_sets": 1, "sessions": 0, "sessions_with_click": 0, "truth": 0}
    for day, size in enumerate(shop.sessions_of_day.tolist()):
        for part, start in enumerate(range(0, size, chunk_sessions)):
            sessions, truth, clicked = shop.make(day, start, min(start + chunk_sessions, size), wording_of)
            _write(uri, shop.date(day), part, sessions, truth)
            rows["sessions"] += len(sessions)
            rows["truth"] += len(truth)
            rows["sessions_with_click"] += clicked
        if on_day:
            on_day(size)
    return rows


def _write(uri: str, date: str, part: int, sessions: pa.Table, truth: pa.Table) -> None:
    name = f"part-{part:05d}.parquet"
    for region, table in _by_region(sessions):
        storage.write_table(storage.join(uri, "sessions", f"dt={date}", f"region={region}", name), table)
    storage.write_table(storage.join(uri, "truth", f"{date}-{name}"), truth)


def _by_region(sessions: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each region, without the column: the folder's name carries it."""
    for region in REGIONS:
        table = sessions.filter(pc.equal(sessions["region"], region)).drop_columns("region")
        if len(table):
            yield region, table


@dataclass(frozen=True)
class Entries:
    """n entries into the chatbot and what led to them: arrays [n, …], `base` alone [I]."""

    session: np.ndarray
    """uint64, the key of its draws."""
    ts: np.ndarray
    t: np.ndarray
    """The same as days since the first day."""
    user: users.Users
    order: orders.Orders
    failures: np.ndarray
    """Failed payments of the last 30 days."""
    active: np.ndarray
    """bool [n, situations]"""
    base: np.ndarray
    """Weights of intents where nothing is known, 0 for those that may not occur yet."""
    prior: np.ndarray
    """Weights [n, I] of the needs before any moment is seen."""
    plausible: np.ndarray
    """Weights [n, I] of the concerns of typed events that have nothing to do with the need."""
    need: np.ndarray
    moments: events.Moments


class Shop:
    """One world: its laws, and its sessions by day and number."""

    def __init__(self, world: config.World, test_days: int = 7):
        self.world = world
        self.draws = Draws(world.seed)
        self.first_test_day = world.days - test_days
        self.needs = needs.NeedModel.draw(self.draws, world.text_share, world.cold_share)
        self.old_ranker = exposure.OldRanker.draw(self.draws, self.needs)
        self.clicks = clicks.MODELS[world.clicks]
        weights = np.resize(WEEKDAY_WEIGHTS, world.days)
        until = np.rint(np.cumsum(weights) / weights.sum() * world.sessions).astype(int)
        self.sessions_of_day = np.diff(until, prepend=0)

    def date(self, day: int) -> str:
        return str(FIRST_DAY + day)

    def entries(self, day: int, start: int, stop: int) -> Entries:
        """Entries `start` … `stop`−1 of a day."""
        number = np.arange(start, stop, dtype=np.uint64)
        session = (np.uint64(day) << np.uint64(40)) + number
        u = self.draws.uniform("entry", session, 3)
        user = users.look_up(
            self.draws, np.floor(self.world.users * u[:, 0] ** PARAMETERS.activity_skew).astype(np.uint64)
        )
        ts = self._times(day, number, u[:, 1])
        t = (ts - FIRST_DAY) / np.timedelta64(1, "D")
        order = orders.look_up(self.draws, user, t)
        failures = self._payment_failures(user.number, t)
        active = needs.situations(user, order, t, failures)

        allow_cold = day >= self.first_test_day
        base = self.needs.base(allow_cold)
        prior = self.needs.weights(active, user.region, allow_cold, 1.0 - self.world.text_share)
        need = pick_rows(u[:, 2:], prior)[:, 0]
        plausible = self.needs.weights(active, user.region, allow_cold, 1.0)
        moments = events.draw(self.draws, session, need, plausible, base, self.world.text_share)
        return Entries(session, ts, t, user, order, failures, active, base, prior, plausible, need, moments)

    def slates(self, entries: Entries) -> exposure.Slates:
        weights = self.old_ranker.weights(entries.active, entries.base > 0)
        return exposure.draw(self.draws, entries.session, weights)

    def make(self, day: int, start: int, stop: int, wording_of: WordingOf) -> tuple[pa.Table, pa.Table, int]:
        """Sessions `start` … `stop`−1 of a day: their table, their truth, and how many have a click."""
        e = self.entries(day, start, stop)
        slates = self.slates(e)
        clicked, resolved = self.clicks.draw(self.draws, e.session, e.need, e.user.bias, slates.shown)

        session_ids = pa.array([f"s{key:016x}" for key in self.draws.keys("session id", e.session).tolist()])
        user_ids = users.ids(self.draws, e.user.number)
        wording = np.asarray(wording_of(user_ids, e.ts))
        table = pa.table(
            {
                "session_id": session_ids,
                "user_id": pa.array(user_ids),
                "ts": pa.array(e.ts),
                **columns.typed(e.user, e.order, e.moments, e.t, e.failures),
                "history": self._history(e.session, e.moments, e.ts, wording),
                "candidate_set": pa.array([CANDIDATE_SET] * len(e.session)),
                **_over_candidates(slates, clicked, resolved),
                "uniform_slate": pa.array(slates.uniform),
            }
        )
        truth = pa.table(
            {
                "session_id": session_ids,
                "need": pa.array(list(kb.index())).take(pa.array(e.need)),
                "b_user": e.user.bias,
                "uniform": slates.uniform,
                "click_model": pa.array([self.world.clicks] * len(e.session)),
            },
            schema=schema.TRUTH,
        )
        return table, truth, int(clicked.any(axis=1).sum())

    def old_weights(self, day: int, start: int, stop: int) -> np.ndarray:
        """The old ranker's weights [n, I] in these sessions; its slates are mixed with uniform ones."""
        entries = self.entries(day, start, stop)
        return self.old_ranker.weights(entries.active, entries.base > 0)

    def _times(self, day: int, number: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Entries in the order of their numbers, spread over the day as people are awake."""
        quantile = (number + u) / self.sessions_of_day[day]
        until = np.concatenate([[0.0], np.cumsum(HOUR_WEIGHTS)]) / sum(HOUR_WEIGHTS)
        seconds = np.interp(quantile, until, np.arange(25) * 3600.0)
        midnight = (FIRST_DAY + day).astype("datetime64[us]")
        return midnight + np.floor(seconds * 1e6).astype("timedelta64[us]")

    def _payment_failures(self, user: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Failures of the last 30 days; the same for all entries of a user in a week."""
        week = (user << np.uint64(16)) + np.floor(t / 7.0).astype(np.uint64)
        return np.floor(-0.8 * np.log(self.draws.uniform("payment failures", week, 1)[:, 0]))

    def _history(
        self, session: np.ndarray, moments: events.Moments, ts: np.ndarray, wording: np.ndarray
    ) -> pa.ListArray:
        """list<event> [n], oldest first; typed events have no text."""
        row, place = np.nonzero(moments.happened)
        kind = moments.kind[row, place]
        speaks = kind >= len(events.typed_kinds())
        written = texts.write(
            self.draws,
            (session[row] << np.uint64(8) | place.astype(np.uint64))[speaks],
            moments.about[row, place][speaks],
            kind[speaks] - len(events.typed_kinds()),
            wording[row][speaks],
        )
        which = np.where(speaks, np.cumsum(speaks) - 1, 0)
        text = written.take(pa.array(which, mask=~speaks))
        age = np.ceil(moments.age[row, place] * 86400e6).astype("timedelta64[us]")
        struct = pa.StructArray.from_arrays(
            [pa.array(events.kinds()).take(pa.array(kind)), text, pa.array(ts[row] - age)], fields=list(schema.EVENT)
        )
        offsets = np.concatenate([[0], np.cumsum(moments.happened.sum(axis=1))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), struct)


def _over_candidates(slates: exposure.Slates, clicked: np.ndarray, resolved: np.ndarray) -> dict[str, pa.Array]:
    """The slate's outcomes as lists over all candidates: false, −1 or 0 where not shown."""
    n, size = slates.shown.shape
    total = len(kb.entries())
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * total)

    def spread(values: np.ndarray, empty: bool | int, kind: type) -> pa.ListArray:
        full: np.ndarray = np.full((n, total), empty, dtype=kind)
        np.put_along_axis(full, slates.shown, values.astype(full.dtype), axis=1)
        return pa.ListArray.from_arrays(offsets, pa.array(full.ravel()))

    return {
        "shown": spread(np.ones((n, size), bool), False, np.bool_),
        "clicks": spread(clicked, False, np.bool_),
        "resolved": spread(resolved, False, np.bool_),
        "position": spread(np.tile(np.arange(size), (n, 1)), -1, np.int16),
        "propensity": spread(slates.propensity, 0, np.float32),
    }
