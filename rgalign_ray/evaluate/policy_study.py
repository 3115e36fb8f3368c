"""Can an offline estimate be trusted? Off-policy evaluation on many shops whose truth is known.

  for each seed: a shop; a tenth of its users make the log, all of them the truth
    targets   policies whose value is estimated from the log: error, interval, effective sample size
    rankers   many rankers of mixed quality: do offline metrics order them as their true CTR does?
  once:       how often an A/A test of the shop's traffic is fooled

The truth is the click model's own expectation over all sessions of the shop, for slates drawn from each policy
under common random numbers. Targets and rankers are made of what the shop knows (its old ranker, popularity, the
true need), in stated amounts: the subject is the estimate, not the ranker.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rgalign_ray import config, metrics, progress, storage
from rgalign_ray.evaluate import ab_test, logged_slates, plackett_luce, policy_value
from rgalign_ray.evaluate.policy_value import LoggedSlates
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.world import generate, kb
from rgalign_ray.world.oracle import Oracle
from rgalign_ray.world.parameters import PARAMETERS

SLOTS = PARAMETERS.slate_size
SESSIONS_PER_USER = 2.5
DAYS = 8
REWARDS: tuple[policy_value.Reward, ...] = ("clicks", "any click")
CONDITIONAL_RATIOS = "conditional ratios"
"""A control: each position's ratio of conditional probabilities, as if they were marginal ones."""
SHOP_POLICY = "old ranker"
TRUE_CTR = f"true CTR@{SLOTS}"


@dataclass(frozen=True)
class Settings:
    clicks: Literal["position", "cascade"] = "position"
    """How users click. Item-position estimators assume the first."""
    seeds: int = 100
    sessions: int = 2000
    """About how many a log holds."""
    population: int = 10
    """Sessions of the shop for each one of the log."""
    draws: int = 2
    """Slates of each session and policy in the truth."""
    rankers: int = 12
    ranker_seeds: int = 30
    """Seeds that compare rankers."""
    bootstrap: int = 500
    a_a_repetitions: int = 2000
    first_seed: int = 1000
    """So that no seed of a training run is met."""


Scores = Callable[["Shop"], np.ndarray]

TARGETS: dict[str, Scores] = {
    SHOP_POLICY: lambda shop: shop.old,
    "sharpened": lambda shop: 2.0 * shop.old,
    "popularity": lambda shop: np.broadcast_to(shop.popularity, shop.old.shape),
    "need +1": lambda shop: shop.old + shop.relevance,
    "need +3": lambda shop: shop.old + 3.0 * shop.relevance,
}
"""Plackett–Luce policies at temperature 1, by name: logits [N, I] of all sessions of a shop."""


@dataclass(frozen=True)
class Shop:
    """All N sessions of one shop, and which of them are the log."""

    ids: list[str]
    users: np.ndarray
    table: pa.Table
    oracle: Oracle
    old: np.ndarray
    """float64 [N, I], logits of the old ranker."""
    popularity: np.ndarray
    """float64 [I], of the old ranker's logits what does not depend on the session."""
    relevance: np.ndarray
    """float64 [N, I], to the true need."""
    rows: np.ndarray
    """int [S], the sessions of the log."""

    @classmethod
    def draw(cls, seed: int, settings: Settings) -> Shop:
        total = settings.sessions * settings.population
        users = round(total / SESSIONS_PER_USER)
        world = config.World(sessions=total, users=users, days=DAYS, clicks=settings.clicks, seed=seed)
        shop = generate.Shop(world)
        parts, weights = [], []
        for day, size in enumerate(shop.sessions_of_day.tolist()):
            parts.append(shop.make(day, 0, size, lambda users, ts: np.zeros(len(users), dtype=int))[:2])
            weights.append(shop.old_weights(day, 0, size))
        table, truth = (pa.concat_tables(tables) for tables in zip(*parts, strict=True))
        ids, of_user = table["session_id"].to_pylist(), np.array(table["user_id"].to_pylist())
        keys, user = np.unique(of_user, return_inverse=True)
        in_log = np.random.default_rng(seed).random(len(keys)) < 1 / settings.population
        oracle = Oracle(truth)
        need = np.array([kb.index()[name] for name in oracle.needs(ids)])
        return cls(
            ids=ids,
            users=of_user,
            table=table,
            oracle=oracle,
            old=np.log(np.concatenate(weights)),
            popularity=shop.old_ranker.popularity,
            relevance=kb.relevance()[need],
            rows=np.flatnonzero(in_log[user]),
        )

    @cached_property
    def log(self) -> LoggedSlates:
        """What was logged, with the marginal propensities that the old ranker's operator would know."""
        sets = pa.table({"candidate_set": [generate.CANDIDATE_SET], "intents": [list(kb.index())]})
        slates = logged_slates.read(self.table.take(self.rows), Catalogue(kb.intents(), sets))
        own = plackett_luce.marginals(plackett_luce.logits(self.old[self.rows], slates.mask), SLOTS)
        even = PARAMETERS.uniform_share / slates.mask.sum(axis=1, keepdims=True)
        return replace(slates, marginal=(1 - PARAMETERS.uniform_share) * slates.of_shown(own) + even)

    def logits(self, scores: np.ndarray) -> np.ndarray:
        return plackett_luce.logits(scores, np.ones(scores.shape, dtype=bool))

    def expected(self, slates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(expected clicks [N], P(at least one click) [N]) where every session is shown its slate [N, K]."""
        return self.oracle.expected_clicks(self.ids, slates), self.oracle.expected(self.ids, slates)[0]

    def truth(self, policies: dict[str, np.ndarray], draws: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
        """By policy (logits [N, I]) and reward: the expected reward of each session [N], over slates drawn with
        the same random numbers for all policies."""
        random = np.random.default_rng(seed)
        found: dict[str, dict[str, np.ndarray]]
        found = {name: {reward: np.zeros(len(self.ids)) for reward in REWARDS} for name in policies}
        for _ in range(draws):
            noise = random.gumbel(size=self.old.shape)
            for name, logits in policies.items():
                for reward, values in zip(
                    REWARDS, self.expected(plackett_luce.best(logits + noise, SLOTS)), strict=True
                ):
                    found[name][reward] += values / draws
        return found


def run(settings: Settings, out: str, workers: int = 1) -> dict[str, Any]:
    """Every seed's result, in order, and the A/A test; what is done already under `out` is read.

    Args:
        workers: processes, each with a shop of its own (about 0.7 GB).

    Returns:
        `seeds`: for each `estimates`, `values` and `rankers`; `a_a`: shares of false positives.
    """
    places = [_place(settings, out, number) for number in range(settings.seeds)]
    missing = [number for number, place in enumerate(places) if not storage.exists(place)]
    with (
        progress.track("policy study", settings.seeds, "shops") as advance,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        advance(settings.seeds - len(missing))
        for done in as_completed([pool.submit(_write_seed, settings, out, number) for number in missing]):
            done.result()
            advance(1)
    return {"seeds": [storage.read_json(place) for place in places], "a_a": a_a_test(settings)}


def _write_seed(settings: Settings, out: str, number: int) -> None:
    with_rankers = number < settings.ranker_seeds
    found = study_seed(settings, settings.first_seed + number, with_rankers)
    storage.write_json(_place(settings, out, number), found)


def _place(settings: Settings, out: str, number: int) -> str:
    return storage.join(out, "seeds", f"{number:04d}-{_key(settings, number < settings.ranker_seeds)}.json")


def _key(settings: Settings, with_rankers: bool) -> str:
    """Of what shapes one seed's result."""
    shaping = {
        name: value
        for name, value in asdict(settings).items()
        if name not in ("seeds", "ranker_seeds", "a_a_repetitions") and (with_rankers or name != "rankers")
    }
    return storage.content_key(shaping, with_rankers)


def study_seed(settings: Settings, seed: int, with_rankers: bool) -> dict[str, Any]:
    """One shop: `estimates` of every target, reward and estimator; `values` of the targets; `rankers`, or none."""
    shop = Shop.draw(seed, settings)
    targets = {name: shop.logits(scores(shop)) for name, scores in TARGETS.items()}
    truth = shop.truth(targets, settings.draws, seed)
    values = {name: {reward: float(by.mean()) for reward, by in it.items()} for name, it in truth.items()}
    rows = [row for name, logits in targets.items() for row in _estimates(shop, name, logits, values[name], settings)]
    rankers = compare_rankers(shop, settings, seed) if with_rankers else []
    return {"estimates": rows, "values": values, "rankers": rankers, "sessions": len(shop.rows)}


def _estimates(
    shop: Shop, target: str, logits: np.ndarray, truth: dict[str, float], settings: Settings
) -> list[dict[str, Any]]:
    log, logits = shop.log, logits[shop.rows]
    pi = plackett_luce.marginals(logits, SLOTS)
    rows = []
    for reward in REWARDS:
        named = policy_value.terms(log, logits, reward, marginals=pi)
        naive = plackett_luce.conditional(logits, log.shown) / log.propensity
        named[CONDITIONAL_RATIOS] = policy_value.ips(naive, log.rewards(reward))
        named["on-policy mean"] = policy_value.on_policy(log, reward)
        for it in policy_value.estimate(named, log.users, repetitions=settings.bootstrap):
            rows.append({"target": target, "reward": reward, "truth": truth[reward], **asdict(it)})
    return rows


def compare_rankers(shop: Shop, settings: Settings, seed: int) -> list[dict[str, float]]:
    """For rankers of mixed quality: their true CTR when they show their best, and what the log says of them.

    Scores are a · old ranker + b · relevance + c · noise + d · clickbait, with a, b, c and d drawn for each.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(settings.rankers):
        a, b, c = random.random(3) * (1.5, 4.0, 2.0)
        d = 1.5 * (random.random() < 0.3)
        noise = random.normal(size=shop.old.shape)
        scores = a * shop.old + b * shop.relevance + c * noise + d * kb.clickbait()
        ctr = float(shop.oracle.expected(shop.ids, plackett_luce.best(scores, SLOTS))[0].mean())
        rows.append({TRUE_CTR: ctr, **offline_metrics(shop, scores[shop.rows])})
    return rows


def offline_metrics(shop: Shop, scores: np.ndarray) -> dict[str, float]:
    """What the log says of a ranker's scores [S, I]; off-policy estimates are of its policy at temperature 1."""
    log = shop.log
    every = np.arange(len(scores))[:, None]
    clicked = np.zeros(scores.shape, dtype=bool)
    clicked[every, log.shown] = log.clicks
    uniform = shop.oracle.uniform([shop.ids[row] for row in shop.rows])
    of_shown = scores[every, log.shown]
    logits = shop.logits(scores)
    pi = plackett_luce.marginals(logits, SLOTS)
    found = {
        "GAUC": _gauc(scores, clicked),
        f"NDCG@{SLOTS}": float(np.nanmean(metrics.ndcg_at_k(scores, clicked, log.mask, SLOTS))),
        "GAUC among shown": _gauc(of_shown, log.clicks),
        "GAUC, uniform slice": _gauc(scores[uniform], clicked[uniform]),
        "GAUC among shown, uniform slice": _gauc(of_shown[uniform], log.clicks[uniform]),
    }
    for reward, names in RANKED_BY.items():
        named = policy_value.terms(log, logits, reward, marginals=pi)
        found |= {f"{name}, {reward}": named[name].value for name in names}
    return found


RANKED_BY: dict[policy_value.Reward, tuple[str, ...]] = {
    "clicks": ("item-position IPS", "item-position SNIPS", "item-position DR", "direct"),
    "any click": ("prefix IPS", "prefix SNIPS", "cascade DR", "slate IPS"),
}
"""Off-policy estimates that rankers are ordered by."""


def _gauc(scores: np.ndarray, clicks: np.ndarray) -> float:
    """GAUC by session of [S, C]; what was not clicked is negative, whether shown or not."""
    session = np.repeat(np.arange(len(scores)), scores.shape[1])
    return metrics.gauc(scores.ravel(), clicks.ravel(), session)


def a_a_test(settings: Settings) -> dict[str, float]:
    """Shares of A/A tests on the first shop's traffic, all under its old ranker, that find a difference at 5 %."""
    shop = Shop.draw(settings.first_seed, settings)
    logits = {SHOP_POLICY: shop.logits(shop.old)}
    rates = shop.truth(logits, settings.draws, settings.first_seed)[SHOP_POLICY]["any click"]
    found = ab_test.rejections(rates, rates, shop.users, repetitions=settings.a_a_repetitions)
    return asdict(found) | {"sessions": float(len(rates)), "users": float(len(np.unique(shop.users)))}
