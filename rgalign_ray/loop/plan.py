"""What a run asks of the cluster, worked out before the first actor starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rgalign_ray.config import DATA_CPUS, Config, Encode, Placed, Rollout, Trained
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
    placed: Placed
    """The section that says on which nodes."""

    @property
    def total_cpus(self) -> float:
        return self.count * self.cpus

    @property
    def total_gpus(self) -> float:
        return self.count * self.gpus


def asks(config: Config) -> list[Ask]:
    """One line per kind of worker, in the order of the stages; those of one stage run at the same time. What the driver
    does by itself has none."""
    rollout, ranker, learner, reward = config.rollout, config.ranker, config.learner, config.reward

    def trainers(stage: str, worker: str, key: str, section: Trained) -> Ask:
        return Ask(stage, worker, section.workers, section.cpus_per_worker, float(section.use_gpu), key, section)

    def readers(stage: str, worker: str, key: str, section: Rollout | Encode, count: int) -> Ask:
        return Ask(stage, worker, count, section.cpus_per_worker, section.gpus_per_worker, key, section)

    least = "rollout.workers" if rollout.min_workers is None else "rollout.min_workers"
    found = [
        readers("encode", "encoder", "encode.workers", config.encode, config.encode.workers),
        trainers("ranker", "ranker worker", "ranker.workers", ranker),
        readers("rollouts", "rollout worker", least, rollout, rollout.least_workers),
        Ask("rewards", "reward model", reward.workers, reward.cpus, 0.0, "reward.workers", reward),
        trainers("align", "learner", "learner.workers", learner),
    ]
    if "grpo" in config.align and config.grpo.sampler == "pool":
        found += [
            readers("align", "sampler", "rollout.workers", rollout, rollout.workers),
            readers("align", "judge", "encode.cpus_per_worker", config.encode, 1),
        ]
    return [ask for ask in found if ask.count]


def served(config: Config) -> list[Ask]:
    """One line per kind of replica of the service, of which there are as many from the start; they run all the time."""
    it = config.serve

    def replicas(worker: str, count: int, key: str, gpus: float = 0.0) -> Ask:
        return Ask("serve", worker, count, it.cpus_per_replica, gpus, key, Placed())

    return [
        replicas("gateway", it.gateways, "serve.gateways"),
        replicas("reasoner", it.reasoners, "serve.reasoners", it.reasoner_gpus),
        replicas("ranker", it.rankers, "serve.rankers"),
    ]


def local_cpus(config: Config) -> int:
    """CPUs that a Ray started on this machine declares."""
    return config.cluster.num_cpus or max(os.cpu_count() or 1, 2)


def check(config: Config, cpus: float, gpus: float) -> None:
    """Refuses a plan that could never be placed.

    Raises:
        ConfigError: with what is asked for, what is there, and the setting to lower.
    """
    for _, together in groupby(asks(config), key=lambda ask: ask.stage):
        _fit(list(together), DATA_CPUS, cpus, gpus)


def check_served(config: Config, cpus: float, gpus: float) -> None:
    """Refuses a service that could never be placed on a cluster that adds no nodes.

    Raises:
        ConfigError: as `check`.
    """
    if not config.cluster.grows:
        _fit(served(config), 0.0, cpus, gpus)


def _fit(together: Sequence[Ask], data_cpus: float, cpus: float, gpus: float, having: str = "the cluster has") -> None:
    for name, extra, there in (("CPUs", data_cpus, cpus), ("GPUs", 0.0, gpus)):
        parts = [(ask, each) for ask in together if (each := ask.cpus if name == "CPUs" else ask.gpus)]
        total = sum(ask.count * each for ask, each in parts) + extra
        if round(total, 6) > there:  # a sum of tenths is a little more than they are
            words = " and ".join(f"{ask.count} x {each:g} {name} for {ask.worker}s" for ask, each in parts)
            data = f" and {extra:g} for Ray Data" if extra else ""
            raise ConfigError(f"{parts[0][0].key}: {words}{data} make {total:g}; {having} {there:g}.")


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of a cluster has."""

    labels: dict[str, str]
    cpus: float
    gpus: float


def check_nodes(config: Config, nodes: Sequence[Node]) -> None:
    """Refuses workers for which the nodes that carry their labels have no room, and one that fits on no node.

    Raises:
        ConfigError: with what is asked for, and what those nodes have.
    """
    for _, together in groupby(asks(config), key=lambda ask: ask.stage):
        _fit_side_by_side(list(together), nodes)
    for ask in asks(config):
        labels = ask.placed.node_labels
        words = f" with {', '.join(f'{key}={value}' for key, value in labels.items())}" if labels else ""
        fit = [node for node in nodes if labels.items() <= node.labels.items()]
        for name, total, there in (
            ("CPUs", ask.total_cpus, sum(node.cpus for node in fit)),
            ("GPUs", ask.total_gpus, sum(node.gpus for node in fit)),
        ):
            if labels and total > there:
                raise ConfigError(
                    f"{ask.key}: {ask.count} {ask.worker}s ask for {total:g} {name} on nodes{words}; of "
                    f"{len(nodes)} nodes {len(fit)} carry that, with {there:g}."
                )
        if not any(node.cpus >= ask.cpus and node.gpus >= ask.gpus for node in fit):
            gpus = f" and {ask.gpus:g} GPUs" if ask.gpus else ""
            raise ConfigError(
                f"{ask.key}: one {ask.worker} asks for {ask.cpus:g} CPUs{gpus} on one node, and none of the "
                f"{len(fit)} nodes{words} has that."
            )


def _fit_side_by_side(together: Sequence[Ask], nodes: Sequence[Node]) -> None:
    """Workers of one stage that are bound to the same nodes; those that ask for further labels are on some of them."""
    for ask in together:
        labels = ask.placed.node_labels.items()
        beside = [each for each in together if labels <= each.placed.node_labels.items()]
        if labels and len(beside) > 1:
            fit = [node for node in nodes if labels <= node.labels.items()]
            having = f"the nodes with {', '.join(f'{key}={value}' for key, value in labels)} have"
            _fit(beside, 0.0, sum(node.cpus for node in fit), sum(node.gpus for node in fit), having)


def check_cluster(config: Config, nodes: Sequence[Node]) -> None:
    """Refuses a plan that the nodes could never hold; one that adds nodes as they are asked for is not asked.

    Raises:
        ConfigError: as `check` and `check_nodes`.
    """
    if not config.cluster.grows:
        check(config, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
        check_nodes(config, nodes)


def table(config: Config, nodes: Sequence[Node] = ()) -> Table:
    """The plan, and what nodes have for it where they are known, as a table for the terminal."""
    from rich.table import Table

    shown = Table(title=f"{config.name}: what each stage asks for (one at a time)", title_justify="left")
    for column in ("stage", "workers", "CPUs", "GPUs", "decided by"):
        shown.add_column(column, justify="right" if column in ("CPUs", "GPUs") else "left")
    for ask in asks(config):
        shown.add_row(ask.stage, f"{ask.count} x {ask.worker}", f"{ask.total_cpus:g}", f"{ask.total_gpus:g}", ask.key)
    shown.add_row("every stage", "Ray Data", f"{DATA_CPUS:g}", "0", "kept free", end_section=True)
    if nodes:
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        where = f"{len(nodes)} node{'s' * (len(nodes) > 1)}{', and grows' * config.cluster.grows}"
        shown.add_row("there are", where, f"{cpus:g}", f"{gpus:g}", config.cluster.address or "this machine")
    shown.caption = (
        f"rounds {config.rounds}: {' + '.join(config.align) or 'no alignment'} · N = {config.rollout.n} · "
        f"ZeRO {config.learner.zero_stage} · dtype {config.reasoner.dtype} · {config.reasoner.model} on "
        f"{config.reasoner.engine}"
    )
    shown.caption_justify = "left"
    return shown
