"""The log, and what becomes of its sessions: the simulated shop, sources, roles, features."""

from __future__ import annotations

import math
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rgalign_ray.config.base import Count, Fraction, Place, Settings


class World(Settings):
    """The simulated shop (`log.source: shop`)."""

    sessions: Count = 2500
    users: Count = 2000
    days: Annotated[int, Field(ge=2)] = 42
    """Length of the log; the last `roles.test_days` are the test period."""
    text_share: Fraction = 0.5
    """Share of the signal about the need that lies in free text alone."""
    cold_share: Fraction = 0.0
    """Share of intents that never occur as need or in a slate before the test period."""
    clicks: Literal["position", "cascade"] = "position"
    """How users click: each position for itself, or reading from the top until the need is resolved."""
    seed: Annotated[int, Field(ge=0)] = 0


class TauRetail(Settings):
    """Files of the τ-bench retail check (`log.source: tau_retail`); relative paths start from `log.uri`."""

    tasks: str = "tasks_train.json"
    """The split of the tasks to read."""
    utterances: str = "../bitext/utterances.parquet"
    """Bitext's customer-support utterances: instruction, intent, category, tags."""
    guidelines: str = "../abcd/guidelines.json"
    """ABCD's agent guidelines."""


class Log(Settings):
    """Where sessions come from."""

    source: Literal["shop", "movielens", "tau_retail", "parquet"] = "shop"
    """shop: simulated (`world`). movielens, tau_retail: made of their owners' files. parquet: a log of your own."""
    uri: Place | None = None
    """parquet: folder of the `sessions` table (partitioned by dt and region). movielens: folder of the
    ml-100k files; by default they come from a pinned package, downloaded into the cache. tau_retail: folder
    of users.json and orders.json."""
    tau_retail: TauRetail = TauRetail()
    intents: Place | None = None
    """parquet: the `intents` table."""
    candidate_sets: Place | None = None
    """parquet: the `candidate_sets` table, where sessions name a set instead of listing candidates."""
    history_length: Count | None = None
    """Newest events of a session's history that are kept and that features read; None: `history.length` of the feature
    spec."""
    start: date | None = None
    """First day (YYYY-MM-DD) to read; None reads from the first."""
    end: date | None = None
    """Last day to read."""
    regions: list[str] | None = None
    """To read; None: all."""

    @model_validator(mode="after")
    def _paths(self) -> Log:
        if self.source == "parquet" and not (self.uri and self.intents):
            raise ValueError("source 'parquet' needs both uri and intents")
        return self


class Roles(Settings):
    """Shares of users by role; `align` is split evenly over the rounds."""

    rank: Fraction = 0.60
    """Rankers learn from them."""
    align: Fraction = 0.15
    """Their clicks judge latent queries, and teach the reasoner."""
    audit: Fraction = 0.0
    """The auditor learns from them."""
    valid: Fraction = 0.10
    """They choose the rankers' epochs."""
    test: Fraction = 0.15
    """They are reported."""
    test_days: Annotated[int, Field(ge=0)] = 7
    """Test sessions are those of test users in the last days; every other role ends before them.
    0: roles do not depend on time."""
    split: Literal["user", "time"] = "user"
    """user: users are hashed into roles, and test users count in the test period alone. time: sessions
    before the test period are hashed by user into rank, align, audit and valid; test is every session
    of the test period (for logs of few users)."""
    cold_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of intents, drawn by `seed`, that test sessions alone have: all others lose them as candidates
    and in the history, and test sessions rank nothing else. The shop has `world.cold_share`."""
    slices: Count | None = None
    """Into how many parts align is cut, one a round; None: as many as there are rounds."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _sum(self) -> Roles:
        total = self.rank + self.align + self.audit + self.valid + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"shares must add up to 1; they add up to {total:g}")
        return self


class Features(Settings):
    spec: str = "shop"
    """Name of a spec of the package (configs/features) or path of a YAML file."""
