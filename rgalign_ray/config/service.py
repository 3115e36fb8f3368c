"""Where a run computes, who is told of it, and how its pair is served."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rgalign_ray.config.base import Count, Place, Positive, Settings, absolute


class Cluster(Settings):
    address: str | None = None
    """Ray address; None starts Ray on this machine."""
    num_cpus: Count | None = None
    """CPUs that a Ray started here declares; None declares the machine's."""
    object_store_mb: Count = 512
    """MiB of the object store of a Ray that is started here."""
    grows: bool = False
    """Nodes are added as they are asked for, by an autoscaler: workers for which there is no room yet are waited for,
    not refused."""


class Variant(Settings):
    """A pair that some of the users are answered by."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    run_dir: Annotated[Place, AfterValidator(absolute)] | None = None
    """None: the configuration's own."""
    round: Annotated[int, Field(ge=0)] | None = None
    """As `serve.round`."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Its share of the users, beside the others' weights; 0: only for those who ask for it by name."""


def _folder(place: str) -> str:
    if "://" in place:
        raise ValueError("a folder of this machine, or one that is mounted on it, and no URI")
    return absolute(place)


Folder = Annotated[str, AfterValidator(_folder)]
"""A path of a filesystem that files can be mapped and locked on."""


class Serve(Settings):
    """The online service of a run's frozen pair."""

    host: str = "127.0.0.1"
    """Address that is listened on; this machine alone, unless another is named."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    round: Annotated[int, Field(ge=0)] | None = None
    """Of the run; None: the last that is whole. 0 is the ranker with the frozen reasoner."""
    variants: list[Variant] = []
    """Pairs to be compared, each for its share of the users: a user always gets the same one. Empty: the run's own."""
    watch_s: Positive = 10.0
    """How often the run directories are looked at for newer rounds, which take over once they are loaded."""
    store: Folder | None = None
    """Where `rgalign read-ahead` keeps vectors of users, which are taken before the reasoner is asked."""
    store_max_age_h: Positive = 24.0
    """A vector that is older is not used: its user has done other things since."""
    feedback: Folder | None = None
    """Where answers and what became of them are kept for the next round; None: nowhere, and feedback is refused."""
    keys: Folder | None = None
    """A file of API keys, a line `NAME KEY` each; None: $RGALIGN_SERVE_KEYS holds such lines, and without it no key is
    asked for. Both are read where `rgalign serve` runs, and gateways are told hashes."""
    rate_per_minute: Count | None = None
    """Requests of one key, or where none is asked for of one address, that a gateway takes; beyond them, 429."""
    budget_ms: Positive = 250.0
    """Milliseconds that an answer may take: the reasoner is waited for as long as the ranker still has its part."""
    ranker_ms: Positive = 50.0
    """Milliseconds of `budget_ms` that are kept for the ranker."""
    batch: Count = 32
    """Sessions that a model reads at once, at most."""
    batch_wait_ms: Annotated[float, Field(ge=0.0)] = 10.0
    """How long a model waits for more of them. One session costs the ranker almost as much as ten."""
    gateways: Count = 1
    """Replicas that take requests."""
    reasoners: Count = 1
    """Replicas that read sessions."""
    rankers: Count = 1
    """Replicas that score."""
    max_gateways: Count | None = None
    """As many replicas as there may be under load; None: `gateways`."""
    max_reasoners: Count | None = None
    """Likewise; None: `reasoners`."""
    max_rankers: Count | None = None
    """Likewise; None: `rankers`."""
    wedged_s: Positive = 60.0
    """A model that is at one batch for longer is started anew, and who waits for an answer so long is refused (503)."""
    cpus_per_replica: Positive = 0.3
    reasoner_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a replica that reads sessions, or a share of one."""
    ongoing: Count = 128
    """Requests that a replica has in work at once, at most. A gateway takes fewer where answers come later than
    `budget_ms`, and tells the others to come back (429)."""
    max_queued: Count = 200
    """Requests that wait for a gateway, beyond which others are refused likewise."""
    max_body_bytes: Count = 1_000_000
    examples: Annotated[int, Field(ge=0)] | None = None
    """Sessions of the log's test users that the page offers; None: some of a simulated log, and none of real users."""
    explore_temperature: Positive | None = None
    """Draw what is shown from the scores divided by it (Plackett–Luce), with the probability of every place in the
    answer; None: the best. Clicks on what is always the best cannot be evaluated off-policy."""

    @model_validator(mode="after")
    def _replicas(self) -> Serve:
        for name in ("gateways", "reasoners", "rankers"):
            most = getattr(self, f"max_{name}")
            if most is not None and most < getattr(self, name):
                raise ValueError(f"max_{name} must be at least {name}")
        return self

    @model_validator(mode="after")
    def _variants(self) -> Serve:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants must have names of their own")
        if self.variants and not sum(variant.weight for variant in self.variants):
            raise ValueError("one of the variants must have a weight")
        return self


class Tracking(Settings):
    """Who is told of a run's figures as its stages end, beside `figures.jsonl` in its run directory."""

    to: list[Literal["tensorboard", "mlflow"]] = []
    """tensorboard: event files in the run directory. mlflow: a tracking server. Each is an extra to be installed."""
    mlflow_uri: Place | None = None
    """Address of the server; None: $MLFLOW_TRACKING_URI. A password comes from the environment, as MLflow has it."""
    experiment: str = "rgalign"
    """That MLflow shows the run under."""
