"""Where the simulated shop puts GAUC: what could be known, what DIN reaches, and what the number of candidates does.

    python -m benchmarks.world_calibration --seed 1000 --sessions 60000
    python -m benchmarks.world_calibration --seed 1000 --sessions 20000 --din --dropout 0.1 --dropout 0.3

Worlds of seeds that no study uses. GAUC is that of logged clicks against all other candidates, on all sessions of the
last week, with its interval over users. It is also shown as it would be if each session ranked its slate and intents
drawn evenly from the rest, `candidates` in all. That needs no other log: of a session with P clicks, with w_s and w_u
its pairs (click, unclicked) in the right order among the shown and the unshown of `size` intents,

    E[AUC] = (w_s + w_u · (candidates − shown) / (size − shown)) / (P · (candidates − P))
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import torch
import typer

from rgalign_ray import config, storage
from rgalign_ray.evaluate.plackett_luce import marginals
from rgalign_ray.evaluate.statistics import Estimate, bootstrap
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.roles import role_of
from rgalign_ray.ranker.batches import score_rows
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.rows import Rows, with_embeddings
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.world import clicks as click_models
from rgalign_ray.world import kb, posterior
from rgalign_ray.world.generate import Entries, Shop, generate
from rgalign_ray.world.parameters import FIRST_DAY, PARAMETERS

ROLES = config.Roles(rank=0.9, align=0.0, valid=0.1, test=0.0, split="time")
CANDIDATES = (10, 20, 40, 1_000_000)
ROWS = 20_000
"""Sessions that become training rows at once."""


def run(
    sessions: Annotated[int, typer.Option(help="Sessions of the log.")] = 60_000,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 1000,
    clicks: Annotated[Literal["position", "cascade"], typer.Option(help="Click model.")] = "position",
    text_share: Annotated[float, typer.Option(help="Share of the signal that lies in texts.")] = 0.5,
    din: Annotated[bool, typer.Option(help="Train DIN as well; takes minutes to hours.")] = False,
    dropout: Annotated[list[float], typer.Option(help="DIN's trials; validation chooses.")] = [0.1, 0.3],  # noqa: B006
    epochs: Annotated[int, typer.Option(help="Most epochs of DIN.")] = 20,
) -> None:
    torch.set_num_threads(1)
    world = config.World(
        sessions=sessions, users=round(0.6 * sessions), seed=seed, clicks=clicks, text_share=text_share
    )
    knowledge(world)
    if din:
        with tempfile.TemporaryDirectory() as folder:
            log = Log(world, folder)
        for share in dropout:
            log.din(share, epochs)


@dataclass(frozen=True)
class Judge:
    """The clicked sessions of the last week: arrays [S, I], and whose they are and how their slates came about [S]."""

    clicks: np.ndarray
    shown: np.ndarray
    users: list[str]
    uniform: np.ndarray

    def show(self, name: str, scores: np.ndarray) -> None:
        """Prints what scores [S, I] reach."""
        auc = self.auc(scores, scores.shape[1])
        found, even = bootstrap(auc, self.users), bootstrap(np.where(self.uniform, auc, np.nan), self.users)
        fewer = (f"{count:,}: {self.auc(scores, count).mean():.4f}" for count in CANDIDATES)
        print(f"{name}: GAUC {interval(found)}; of {', '.join(fewer)}; uniform {interval(even)}", flush=True)

    def auc(self, scores: np.ndarray, candidates: int) -> np.ndarray:
        """E[AUC] [S] where `candidates` intents are ranked: the slate and others drawn evenly."""
        right = {True: np.zeros(len(scores)), False: np.zeros(len(scores))}
        session, intent = np.nonzero(self.clicks)
        score = scores[session, intent][:, None]
        order = (score > scores[session]) + 0.5 * (score == scores[session])
        for is_shown in right:
            others = ~self.clicks[session] & (self.shown[session] == is_shown)
            np.add.at(right[is_shown], session, (order * others).sum(axis=1))
        positives, seen = self.clicks.sum(axis=1), self.shown.sum(axis=1)
        share = (candidates - seen) / (scores.shape[1] - seen)
        return (right[True] + share * right[False]) / (positives * (candidates - positives))


def interval(found: Estimate) -> str:
    return f"{found.mean:.4f} ({found.users[0]:.4f}–{found.users[1]:.4f})"


def knowledge(world: config.World) -> None:
    """What anyone could reach who knows the world's laws and this much of a session."""
    shop = Shop(world)
    days = [Day(shop, day) for day in range(shop.first_test_day, world.days)]
    judge = Judge(*(np.concatenate([day.logged[i] for day in days]) for i in range(4)))  # type: ignore[arg-type]
    sessions = sum(day.sessions for day in days)
    share, vain = len(judge.clicks) / sessions, np.concatenate([day.vain for day in days]).mean()
    print(f"seed {world.seed}, clicks {world.clicks}, text_share {world.text_share:g}")
    print(
        f"{sessions:,} sessions in the last week, {share:.1%} with a click, {vain:.1%} of these with nothing relevant"
    )
    for name in days[0].scores:
        judge.show(name, np.concatenate([day.scores[name] for day in days]))
    for name in days[0].quality:
        recall, ctr, resolved = np.concatenate([day.quality[name] for day in days], axis=1).mean(axis=1)
        print(f"{name}: need among the first 3 {recall:.4f}, true CTR@3 {ctr:.4f}, resolved@3 {resolved:.4f}")


class Day:
    """Of a day's sessions: how the world's own laws score them, by what is known of a session."""

    def __init__(self, shop: Shop, day: int) -> None:
        e = shop.entries(day, 0, int(shop.sessions_of_day[day]))
        slates = shop.slates(e)
        clicked, _ = shop.clicks.draw(shop.draws, e.session, e.need, e.user.bias, slates.shown)
        row = np.flatnonzero(clicked.any(axis=1))
        share = shop.world.text_share
        needs = {
            "need": np.eye(e.prior.shape[1])[e.need],
            "typed and texts": posterior.of_needs(e.prior, e.moments, e.plausible, e.base, share),
            "typed": posterior.of_needs(e.prior, e.moments, e.plausible, e.base, share, reads_texts=False),
        }
        likes = {known: _likes(chances) for known, chances in needs.items()}
        looks = _looks(shop.old_ranker.weights(e.active[row], e.base > 0), e.base > 0)
        shown, marks = np.zeros((2, *looks.shape), bool)
        np.put_along_axis(shown, slates.shown[row], True, axis=1)
        np.put_along_axis(marks, slates.shown[row], clicked[row], axis=1)
        self.sessions = len(e.need)
        self.logged = (marks, shown, e.user.number[row], slates.uniform[row])
        """Of clicked sessions: clicks, shown, users, uniform."""
        self.vain = kb.relevance()[e.need[row, None], slates.shown[row]].max(axis=1) == 0.0
        """Of clicked sessions: nothing that was shown has to do with the need."""
        self.scores = {f"{known}, P(click if shown)": chances[row] for known, chances in likes.items()}
        self.scores |= {f"{known}, P(shown and clicked)": chances[row] * looks for known, chances in likes.items()}
        self.scores["P(shown and looked at), the old ranker"] = looks
        """Of clicked sessions [S, I], by name."""
        self.quality = {known: _quality(shop, e, chances) for known, chances in likes.items()}
        """Of all sessions [3, n]: need among the first three, true CTR@3, resolved@3."""


def _quality(shop: Shop, e: Entries, scores: np.ndarray) -> np.ndarray:
    top = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    return np.stack([(top == e.need[:, None]).any(axis=1), *shop.clicks.expected(e.need, e.user.bias, top)])


def _likes(needs: np.ndarray) -> np.ndarray:
    """P(click | looked at) [n, I] of each intent, given P(need) [n, I], over users' biases (Gauss and Hermite)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    size = needs.shape[1]
    every = np.arange(size)
    table = np.zeros((size, size))  # need by intent
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        bias = np.full(size, PARAMETERS.user_spread * node)
        table += weight * click_models.attraction(every, bias, np.tile(every, (size, 1)))
    return needs @ table


def _looks(weights: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Σ_k examination(k) · P(the intent is at k) [n, I], by the mixture of both ways to draw a slate of three."""
    even = np.tile(allowed / allowed.sum(), (len(weights), 1))
    share = PARAMETERS.uniform_share
    places = [
        (1.0 - share) * mine + share * evenly
        for mine, evenly in zip(_places(weights / weights.sum(axis=1, keepdims=True)), _places(even), strict=True)
    ]
    return sum(look * place for look, place in zip(click_models.examination(len(places)), places, strict=True))


def _places(p: np.ndarray) -> list[np.ndarray]:
    """P(the intent is at place k) [n, I] for k = 0, 1, 2 of a Plackett–Luce draw with probabilities p [n, I]."""
    with np.errstate(divide="ignore"):  # an intent that is never drawn
        return list(np.moveaxis(marginals(np.log(p), 3), -1, 0))


class Log:
    """A log of the shop: rows to train on, and the clicked sessions of its last week."""

    def __init__(self, world: config.World, uri: str) -> None:
        generate(world, uri, wording_of=lambda users, ts: np.zeros(len(users), dtype=int))
        self.catalogue = Catalogue.load(uri)
        table = storage.read_table(storage.join(uri, "sessions")).drop_columns(["position", "propensity", "resolved"])
        last_day = FIRST_DAY + np.timedelta64(world.days - 1, "D")
        role = role_of(table["user_id"].to_pylist(), table["ts"].to_numpy(), ROLES, 1, last_day)
        self.space = FeatureSpace.fit(FeatureSpec.load("shop"), [table.filter(pa.array(role == "rank"))])
        self.train = self._rows(table.filter(pa.array(role != "test"))) | {"valid": role[role != "test"] == "valid"}
        tested = table.filter(pa.array(role == "test"))
        rows = self._rows(tested)
        clicked = rows["clicks"].any(axis=1)
        self.test = {name: values[clicked] for name, values in rows.items()}
        tested = tested.filter(pa.array(clicked))
        users, uniform = tested["user_id"].to_pylist(), tested["uniform_slate"].to_numpy()
        self.judge = Judge(self.test["clicks"], self.test["shown"], users, uniform)

    def din(self, dropout: float, epochs: int) -> None:
        """Trains DIN and shows what the epoch of the best validation GAUC reaches."""
        start = time.monotonic()
        sizes = Sizes.of(self.space, num_intents=self.catalogue.size, embedding_dim=0, item_dim=0)
        settings = config.Ranker(dropout=dropout, epochs=epochs)
        training = Fit("din", sizes, settings, self.train, None, 0, Group())
        figures = training.run(
            lambda run: print(f"  epoch {run.progress.epoch}: validation {run.progress.gaucs[-1]:.4f}", flush=True)
        )
        print(f"  {figures['sessions']:,} sessions, {time.monotonic() - start:.0f} s, epoch {figures['best_epoch']}")
        name = f"DIN, dropout {dropout:g}, validation {figures['best_gauc']:.4f}"
        self.judge.show(name, score_rows(training.model, self.test, "null"))

    def _rows(self, table: pa.Table) -> Rows:
        parts = [
            with_embeddings(examples(table.slice(start, ROWS), self.space, self.catalogue), None)
            for start in range(0, len(table), ROWS)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    typer.run(run)
