"""What a run asks of the cluster, worked out before the first actor starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rgalign_ray.config import DATA_CPUS, Config
from rgalign_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Ask:
    """What one kind of worker asks for while its stages run."""

    stage: str
    worker: str
    count: int
    cpus: float
    gpus: float
    key: str
    """The setting that decides `count`."""

    @property
    def total_cpus(self) -> float:
        return self.count * self.cpus

    @property
    def total_gpus(self) -> float:
        return self.count * self.gpus


def asks(config: Config) -> list[Ask]:
    """One line per kind of worker, in the order of the stages; no two of them run at the same time."""
    rollout, encode, ranker, learner = config.rollout, config.encode, config.ranker, config.learner
    return [
        Ask("encode", "encoder", encode.workers, encode.cpus_per_worker, encode.gpus_per_worker, "encode.workers"),
        Ask("ranker", "ranker worker", ranker.workers, ranker.cpus_per_worker, float(ranker.use_gpu), "ranker.workers"),
        Ask(
            "rollouts", "rollout worker", rollout.least_workers, rollout.cpus_per_worker, rollout.gpus_per_worker,
            "rollout.workers" if rollout.min_workers is None else "rollout.min_workers",
        ),
        Ask("rewards", "reward model", 1, config.reward.cpus, 0.0, "reward.cpus"),
        Ask("align", "learner", learner.workers, learner.cpus_per_worker, float(learner.use_gpu), "learner.workers"),
    ]  # fmt: skip


def local_cpus(config: Config) -> int:
    """CPUs that a Ray started on this machine declares."""
    return config.cluster.num_cpus or max(os.cpu_count() or 1, 2)


def check(config: Config, cpus: float, gpus: float) -> None:
    """Refuses a plan that could never be placed.

    Raises:
        ConfigError: with what is asked for, what is there, and the setting to lower.
    """
    if config.reasoner.engine == "sentence":
        raise ConfigError("reasoner.engine: a sentence encoder writes no queries; it is for `compare.encoder`.")
    for ask in asks(config):
        if ask.total_cpus + DATA_CPUS > cpus:
            raise ConfigError(
                f"{ask.key}: {ask.count} x {ask.cpus:g} CPUs for {ask.worker}s and {DATA_CPUS:g} for Ray Data make "
                f"{ask.total_cpus + DATA_CPUS:g}; the cluster has {cpus:g}."
            )
        if ask.total_gpus > gpus:
            raise ConfigError(
                f"{ask.key}: {ask.count} x {ask.gpus:g} GPUs for {ask.worker}s make {ask.total_gpus:g}; "
                f"the cluster has {gpus:g}."
            )


def table(config: Config) -> Table:
    """The plan as a table for the terminal."""
    from rich.table import Table

    shown = Table(title=f"{config.name}: what each stage asks for (one at a time)", title_justify="left")
    for column in ("stage", "workers", "CPUs", "GPUs", "decided by"):
        shown.add_column(column, justify="right" if column in ("CPUs", "GPUs") else "left")
    for ask in asks(config):
        shown.add_row(ask.stage, f"{ask.count} x {ask.worker}", f"{ask.total_cpus:g}", f"{ask.total_gpus:g}", ask.key)
    shown.add_row("every stage", "Ray Data", f"{DATA_CPUS:g}", "0", "kept free")
    shown.caption = (
        f"rounds {config.rounds}: {' + '.join(config.align) or 'no alignment'} · N = {config.rollout.n} · "
        f"ZeRO {config.learner.zero_stage} · dtype {config.reasoner.dtype} · {config.reasoner.model} on "
        f"{config.reasoner.engine}"
    )
    shown.caption_justify = "left"
    return shown
