"""Joining Ray: one started on this machine, or somebody's cluster."""

from __future__ import annotations

from rgalign_ray.config import Config
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.loop import environment, plan


def join(config: Config) -> None:
    """Starts Ray on this machine, or joins `cluster.address`; does nothing when that is done.

    Raises:
        InfrastructureError: when the address does not answer, or Ray does not start on this machine.
    """
    environment.prepare(config)
    import ray

    if not ray.is_initialized():
        cluster = config.cluster
        quiet = {"logging_level": "error", "logging_config": ray.LoggingConfig(log_level="ERROR")}
        if cluster.address is None:
            try:
                ray.init(
                    address="local",  # else Ray joins whatever cluster was last started on this machine, dead or alive
                    num_cpus=plan.local_cpus(config),
                    object_store_memory=cluster.object_store_mb * 2**20,
                    include_dashboard=False,
                    **quiet,
                )
            except Exception as error:  # Ray raises no narrower one when a node is not up within its 30 s
                raise InfrastructureError(
                    f"Ray did not start on this machine ({error}); a machine under heavy load is too slow for it."
                ) from error
        else:
            try:
                ray.init(address=cluster.address, runtime_env={"env_vars": environment.for_workers()}, **quiet)
            except ConnectionError as error:
                raise InfrastructureError(f"cluster.address: {cluster.address} does not answer ({error}).") from None
        ray.data.DataContext.get_current().enable_progress_bars = False


def nodes(config: Config) -> list[plan.Node]:
    """What the cluster has, which is joined; of this machine what a Ray here would declare, and none is started.

    Raises:
        InfrastructureError: when the address does not answer.
    """
    if config.cluster.address is None:
        import torch

        return [plan.Node({}, plan.local_cpus(config), torch.cuda.device_count())]
    join(config)
    import ray

    alive = [(node["Labels"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [plan.Node(labels, has.get("CPU", 0.0), has.get("GPU", 0.0)) for labels, has in alive]


def connect(config: Config) -> None:
    """Joins Ray as `join` does, and checks that it can hold the plan.

    Raises:
        ConfigError: when the cluster cannot hold the plan.
        InfrastructureError: when the address does not answer, or Ray does not start on this machine.
    """
    join(config)
    plan.check_cluster(config, nodes(config))
