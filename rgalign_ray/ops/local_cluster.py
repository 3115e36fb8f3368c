"""A Ray cluster on this machine: a head and, if asked for, more nodes, that jobs are submitted to.

Each node is one `ray start --block` of ours. What was started is recorded, so that `down` ends those processes and
no other Ray of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rgalign_ray import progress
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.loop import environment
from rgalign_ray.reasoner.models import cache_dir

LOOPBACK = "127.0.0.1"
PORT = 6379
DASHBOARD_PORT = 8265
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
ASK_EVERY_S = 0.2
LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class Node:
    """A process that holds one node; the time tells it from a later process of the same id."""

    pid: int
    created: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """What `up` has started."""

    address: str
    """Of its head, for `cluster.address`."""
    dashboard: str
    """Where jobs are submitted."""
    nodes: list[Node]


def record() -> Path:
    """The file that says what is up, one for a user of this machine."""
    return cache_dir() / "cluster" / "cluster.json"


def running() -> Cluster | None:
    """The cluster that is up here, or None."""
    try:
        data = json.loads(record().read_text())
    except FileNotFoundError:
        return None
    cluster = Cluster(data["address"], data["dashboard"], [Node(**node) for node in data["nodes"]])
    return cluster if _process(cluster.nodes[0]) else None


def up(
    nodes: int = 1,
    cpus: int | None = None,
    host: str = LOOPBACK,
    port: int = PORT,
    dashboard_port: int = DASHBOARD_PORT,
) -> Cluster:
    """Starts a head and `nodes` - 1 more nodes, and waits until jobs can be submitted.

    Every process of it asks for the user's token, which is made when there is none. The dashboard, where jobs are
    submitted, listens on this machine alone.

    Args:
        nodes: at least 1.
        cpus: that each node declares; None: an even share of the machine's.
        host: address of this machine that nodes of others may join.
        port: of the head.
        dashboard_port: of the dashboard.

    Raises:
        ConfigError: when a cluster is up, or a port is taken.
        InfrastructureError: when a node does not start.
    """
    if (there := running()) is not None:
        raise ConfigError(f"cluster: one is up already at {there.dashboard}; `rgalign cluster down` ends it.")
    for taken, name in ((port, "--port"), (dashboard_port, "--dashboard-port")):
        if listens(taken):
            raise ConfigError(f"cluster: {name} {taken} is taken by another process of this machine.")
    down()  # nodes of a head that died
    environment.ensure_token()
    cpus = cpus or max((os.cpu_count() or 1) // nodes, 1)
    record().parent.mkdir(parents=True, exist_ok=True)
    head = [
        *("--head", f"--node-ip-address={host}", f"--port={port}", "--disable-usage-stats"),
        *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"),
    ]
    cluster = Cluster(f"{host}:{port}", f"http://{LOOPBACK}:{dashboard_port}", [])
    with progress.track("starting", nodes, "nodes") as advance:
        try:
            for number in range(nodes):
                _node(cluster, cpus, head if number == 0 else _joining(cluster))
                advance(1)
        except InfrastructureError:
            down()
            raise
    return cluster


def add(cpus: int = 1, labels: dict[str, str] | None = None) -> Cluster:
    """Starts one more node of the cluster that is up, and waits until work can be put on it.

    Args:
        cpus: that it declares, at least 1.
        labels: of the node, as `node_labels` of a configuration asks for them.

    Raises:
        ConfigError: when no cluster is up.
        InfrastructureError: when the node does not start.
    """
    cluster = running()
    if cluster is None:
        raise ConfigError("cluster: none is up on this machine; `rgalign cluster up` starts one.")
    environment.ensure_token()
    labelled = [f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}"] if labels else []
    _node(cluster, cpus, [*_joining(cluster), *labelled])
    return cluster


def down() -> int:
    """Ends what `up` has started, and returns how many nodes that were."""
    try:
        data: dict[str, Any] = json.loads(record().read_text())
    except FileNotFoundError:
        return 0
    nodes = [found for node in data["nodes"] if (found := _process(Node(**node)))]
    for node in reversed(nodes):  # the head last
        family = node.children(recursive=True)
        node.terminate()
        _, left = psutil.wait_procs([node, *family], timeout=STOP_DEADLINE_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    record().unlink()
    return len(nodes)


def _joining(cluster: Cluster) -> list[str]:
    # nodes that share a folder unpack a job's code over each other, while it runs
    own = tempfile.mkdtemp(prefix=f"ray-node-{len(cluster.nodes)}-")
    return [f"--address={cluster.address}", f"--temp-dir={own}"]


def _node(cluster: Cluster, cpus: int, arguments: list[str]) -> None:
    """Starts a node, records it, and waits for it."""
    log = record().parent / f"node_{len(cluster.nodes)}.log"
    # Ray's own choice is one number for all nodes and clusters of a machine; without it a node takes no jobs
    agent = f"--dashboard-agent-listen-port={free_port()}"
    before = _alive(cluster.dashboard) if cluster.nodes else set()
    process = _start([*arguments, f"--num-cpus={cpus}", agent], log)
    cluster.nodes.append(Node(process.pid, process.create_time()))
    record().write_text(json.dumps(asdict(cluster)))
    _wait(process, log, cluster.dashboard, before)


def _start(arguments: list[str], log: Path) -> psutil.Process:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    variables = environment.WORKERS | environment.LOCAL | os.environ
    # a job is run by the `python` that is found first: the one that has this package
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    with log.open("wb") as out:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    return psutil.Process(started.pid)


def _wait(node: psutil.Process, log: Path, dashboard: str, before: set[str]) -> None:
    """Until the dashboard answers and tells of a node that was not there before."""
    until = time.monotonic() + START_DEADLINE_S
    while not (_answers(f"{dashboard}/api/version") and _alive(dashboard) - before):
        if node.status() == psutil.STATUS_ZOMBIE or time.monotonic() > until:
            told = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise InfrastructureError(f"cluster: a node did not start; the end of {log}:\n{told}")
        time.sleep(ASK_EVERY_S)


def _alive(dashboard: str) -> set[str]:
    """The nodes that can be given work: the dashboard answers before the head's own has told what it has."""
    from ray.util.state import list_nodes  # after `environment.ensure_token`: ray reads the mode as it is imported
    from ray.util.state.exception import RayStateApiException

    with suppress(RayStateApiException):
        found = list_nodes(address=dashboard)
        return {node.node_id for node in found if node.state == "ALIVE" and (node.resources_total or {}).get("CPU")}
    return set()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1.0).close()
    except urllib.error.HTTPError:  # it asks for the token
        return True
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something on this machine takes connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _process(node: Node) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(node.pid)
        if process.create_time() == node.created and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
