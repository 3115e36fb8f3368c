"""The configuration, and how it is read: YAML, `--set a.b=c`, and nothing unknown."""

from __future__ import annotations

import math
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from rgalign_ray.config.alignment import AlignName, Contrastive, Dpo, Gradient, Grpo, Latent, Learner, Select, Sft
from rgalign_ray.config.base import Count, Distinct, Place, Settings, absolute, packaged_yaml, read_yaml, sentence
from rgalign_ray.config.data import Features, Log, Roles, World
from rgalign_ray.config.ranking import Baseline, Ranker, Retrain, Reward
from rgalign_ray.config.reasoning import Encode, Prompt, Reasoner, Rollout, Teacher
from rgalign_ray.config.service import Cluster, Serve, Tracking
from rgalign_ray.config.study import Compare, Evaluate
from rgalign_ray.errors import ConfigError


class Config(Settings):
    """One run of the closed loop."""

    name: str = "run"
    run_dir: Place = "runs/{name}"
    """Folder or URI of the run; {name} is filled in."""
    seed: Annotated[int, Field(ge=0)] = 0
    world: World = World()
    log: Log = Log()
    roles: Roles = Roles()
    features: Features = Features()
    prompt: Prompt = Prompt()
    reasoner: Reasoner = Reasoner()
    rollout: Rollout = Rollout()
    teachers: list[Teacher] = []
    """Others who propose queries for the alignment; the ranker does not care who wrote the best one."""
    encode: Encode = Encode()
    ranker: Ranker = Ranker()
    retrain: Retrain = Retrain()
    baselines: Annotated[list[Baseline], Distinct] = ["two_tower"]
    """Rankers without an LLM that round 0 trains as well."""
    reward: Reward = Reward()
    select: Select = Select()
    align: Annotated[list[AlignName], Distinct] = ["gradient"]
    """Objectives of a round, each starting from the one before."""
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()
    contrastive: Contrastive = Contrastive()
    gradient: Gradient = Gradient()
    latent: Latent = Latent()
    learner: Learner = Learner()
    crossfit: Annotated[int, Field(ge=0)] = 0
    """For small logs: align on the sessions of role rank, each judged by one of so many rankers, the one that has not
    learned from its user; no user is set aside then. 0 aligns on users of their own (`roles.align`). 1 is no way to
    align: the ranker judges what it has learned from, and the ladder shows what that is worth. In rounds after the
    first, the reasoner that the judges read with has learned from all of these sessions."""
    rounds: Count = 1
    """Alignments, each on a slice of its own (`roles.align` is split evenly) and judged by the ranker before it."""
    early_stop: bool = False
    """End with the first round after which the auditor sees no gain in the queries of validation sessions."""
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    serve: Serve = Serve()

    @property
    def run_uri(self) -> str:
        """`run_dir` with the name filled in; a path is made absolute, since workers run in other folders."""
        return absolute(self.run_dir.replace("{name}", self.name))

    @property
    def align_slices(self) -> int:
        """Parts of role align."""
        return self.roles.slices or self.rounds

    def scaled(self, factor: float) -> Config:
        """The same with `factor` times the sessions and users of the simulated shop.

        Raises:
            ConfigError: for another log, which has the size it has, or a factor that leaves nothing.
        """
        if self.log.source != "shop":
            raise ConfigError(f"--scale: the log is {self.log.source}; only the simulated shop can be made larger.")
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"--scale: {factor:g}; give a number above 0.")
        world = self.world.model_dump()
        sizes = {name: round(world[name] * factor) for name in ("sessions", "users")}
        return validate(self.model_dump(mode="json") | {"world": world | sizes})

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        if self.align and (self.ranker.query_input.query == 0 or self.encode.query_share == 0):
            raise ValueError(
                "ranker.query_input.query and encode.query_share must be above 0: "
                "a reward ranker that never saw e(x,q) cannot judge queries"
            )
        if self.reasoner.engine == "sentence":
            raise ValueError("reasoner.engine: a sentence encoder writes no queries; it is for compare.encoder")
        proposed = self.rollout.n + sum(teacher.n for teacher in self.teachers)
        if self.select.n and self.select.n > proposed:
            raise ValueError(f"select.n ({self.select.n}) is more than the {proposed} queries that a session gets")
        if len({teacher.name for teacher in self.teachers}) < len(self.teachers):
            raise ValueError("teachers: two have the same name")
        if self.ranker.dim % self.ranker.heads:
            raise ValueError(f"ranker.dim ({self.ranker.dim}) must be a multiple of ranker.heads ({self.ranker.heads})")
        if self.select.method == "title" and "dpo" in self.align:
            raise ValueError("select.method 'title' chooses no query, so that dpo has no pairs to learn from")
        at_once = self.learner.ranks * self.learner.micro_batch
        for name in self.align:
            if getattr(self, name).batch_sessions % at_once:
                raise ValueError(
                    f"{name}.batch_sessions must be a multiple of learner.workers x micro_batch ({at_once})"
                )
        if "grpo" in self.align and self.grpo.sampler == "pool" and not self.learner.workers:
            raise ValueError("grpo.sampler 'pool' is for learners beside the driver; set learner.workers to 1 or more")
        if self.log.end and self.log.source == "shop":
            raise ValueError("log.end is for other logs: the shop is as long as world.days, whose last are for test")
        if self.roles.cold_share and self.log.source == "shop":
            raise ValueError("roles.cold_share is for other logs: the shop draws its cold intents by world.cold_share")
        if self.log.source == "tau_retail" and self.roles.test_days:
            raise ValueError("roles.test_days must be 0 for log.source tau_retail: its tasks have no time")
        if self.rounds > self.align_slices:
            raise ValueError(f"rounds is {self.rounds}, but roles.slices cuts align into {self.align_slices}")
        if self.early_stop and not self.roles.audit:
            raise ValueError("early_stop asks the auditor, and roles.audit is 0: there is none")
        if self.roles.rank == 0 or (self.roles.align == 0 and not self.crossfit):
            raise ValueError("roles.rank must be above 0, and so must roles.align unless crossfit is")
        if self.crossfit > 1 and self.roles.align:
            raise ValueError("crossfit needs no users of role align; set roles.align to 0, and give its share to rank")
        asking = [name for name in self.align if name not in ("sft", "dpo")]
        if self.crossfit > 1 and asking:
            raise ValueError(
                f"crossfit does not go with {asking[0]}, which asks one ranker about every session as it learns, and "
                "sft and dpo do not: set align to those, or give align some users of their own"
            )
        return self


def available() -> list[str]:
    """Names of the configurations inside the package."""
    return packaged_yaml("")


def load(name_or_path: str, overrides: list[str] | None = None) -> Config:
    """The configuration named (inside the package) or at a path, with `a.b=c` overrides applied.

    Who names the rows of a comparison names all of them: the exploratory ones that stand there are left out.

    Raises:
        ConfigError: for an unknown name, an unreadable file, an unknown key (with the nearest valid
            one) or an ill-typed value, by the key's full name.
    """
    data = _read(name_or_path)
    if any(override.partition("=")[0].strip() == "compare.rows" for override in overrides or []):
        _assign(data, "compare.exploratory", [])
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, as in --set ranker.dim=64.")
        _assign(data, key.strip(), _parse(f"--set {key}", text))
    return validate(data)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with settings replaced by their full names (a.b), and checked."""
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        _assign(data, key, value)
    return validate(data)


def with_setting(config: Config, key: str, text: str) -> Config:
    """The configuration with the setting `key` (a.b) replaced by the value that `text` holds as YAML.

    Raises:
        ConfigError: for an unknown key, text that is no YAML, or an ill-typed value.
    """
    return changed(config, {key: _parse(key, text)})


def validate(data: dict[str, Any]) -> Config:
    """A `Config` from plain data, or the `ConfigError` of its first fault."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(sentence(error, Config)) from None


def _read(name_or_path: str) -> dict[str, Any]:
    data = read_yaml(name_or_path, "", f"--config {name_or_path}") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {name_or_path}: expected keys and values, found {type(data).__name__}.")
    return data


def _parse(where: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: '{text}' is not a valid value.") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        child = data.setdefault(part, {})
        if not isinstance(child, dict):
            place = ".".join(parents[: depth + 1])
            raise ConfigError(f"{key}: '{place}' is a value, not a group of settings.")
        data = child
    data[last] = value
