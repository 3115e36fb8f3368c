"""Whether this machine, and the cluster that is named, can hold a run: what is wrong is told before anything is spent.

Each check looks at one thing and returns one `Finding`. None of them starts Ray, and none writes anything but a probe
of a few bytes in the run's folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError, DataError, InfrastructureError, first_line
from rgalign_ray.loop import plan
from rgalign_ray.ops import local_cluster

PACKAGE = "rgalign_ray"
SHOWN = ("ray", "torch", "transformers", "trl", "deepspeed", "pyarrow")
MEMORY_GB = 8.0
"""What the demo needs, measured."""
DISK_GB = (1.0, 5.0)
"""Too little, and little: the demo writes about half a gigabyte, a comparison several."""
CONNECT_S = 3.0
LOCK_AGE_S = 600.0
"""A build of DeepSpeed's takes a minute or two; a lock that is older was left by one that was killed."""
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found."""

    check: str
    state: Literal["ok", "warning", "failure"]
    """A run with a warning works, but slowly, or unsafely; with a failure it does not."""
    what: str
    way_out: str = ""


def examine(config: Config, job_server: str | None = None) -> Iterator[Finding]:
    """The findings of all checks, one after the other; if it is given, of the cluster of `job_server` as well."""
    if job_server is not None:
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    for check in CHECKS:
        yield check(config)
    if job_server is not None:
        yield submission(config, job_server)


def versions(config: Config) -> Finding:
    """Whether what is installed is what this package asks for."""
    wrong = []
    for line in importlib.metadata.requires(PACKAGE) or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} is {there}, not {wanted.specifier}")
    if wrong:
        return Finding(
            "versions",
            "failure",
            "; ".join(wrong),
            "in the checkout: pip install --constraint constraints.txt --editable .",
        )
    told = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    return Finding("versions", "ok", f"Python {sys.version.split()[0]}, {told}")


def vllm(config: Config) -> Finding:
    """Whether vLLM's environment, where there is one, has the Ray and the Python of this one."""
    python = config.reasoner.vllm.python
    if python is None:
        return Finding("vLLM", "ok", "no environment of its own is named")
    code = "import ray, sys; print(ray.__version__, '%d.%d' % sys.version_info[:2])"
    try:
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "vLLM", "failure", f"{python} does not run Ray ({type(error).__name__})", "make test-vllm makes one"
        )
    there = told.split()
    here = [importlib.metadata.version("ray"), f"{sys.version_info[0]}.{sys.version_info[1]}"]
    if there != here:
        what = f"Ray {there[0]} on Python {there[1]} there, Ray {here[0]} on Python {here[1]} here"
        return Finding("vLLM", "failure", what, "make its environment with the same two: make test-vllm")
    return Finding("vLLM", "ok", f"{python}: Ray {there[0]}, Python {there[1]}")


def processors(config: Config) -> Finding:
    """Whether this machine's CPUs and GPUs hold the plan, where no cluster is named."""
    if config.cluster.address is not None:
        return Finding("processors", "ok", "the cluster's; checked when the run joins it")
    cpus, gpus = plan.local_cpus(config), 0
    if any(ask.gpus for ask in plan.asks(config)):
        import torch

        gpus = torch.cuda.device_count()
    try:
        plan.check(config, cpus, gpus)
    except ConfigError as error:
        return Finding("processors", "failure", str(error), "lower that setting, or name a cluster by cluster.address")
    return Finding("processors", "ok", f"{cpus} CPUs and {gpus} GPUs hold every stage")


def memory(config: Config) -> Finding:
    """Whether there is the memory that the demo needs."""
    free = psutil.virtual_memory().available / 2**30
    if free < MEMORY_GB:
        what = f"{free:.1f} GiB free; the demo needs {MEMORY_GB:g}"
        return Finding("memory", "warning", what, "end other programs, or lower the numbers of workers")
    return Finding("memory", "ok", f"{free:.1f} GiB free")


def shared_memory(config: Config) -> Finding:
    """Whether Ray's object store fits into shared memory."""
    if config.cluster.address is not None or not Path(SHARED_MEMORY).exists():
        return Finding("shared memory", "ok", "not asked for here")
    there, wanted = shutil.disk_usage(SHARED_MEMORY).free / 2**20, config.cluster.object_store_mb
    if there < wanted:
        what = (
            f"{SHARED_MEMORY} has {there:,.0f} MiB, the object store wants {wanted:,}: Ray would take the disk, slowly"
        )
        return Finding("shared memory", "warning", what, "docker run --shm-size, or lower cluster.object_store_mb")
    return Finding("shared memory", "ok", f"{there:,.0f} MiB in {SHARED_MEMORY}, for an object store of {wanted:,}")


def disk(config: Config) -> Finding:
    """Whether a local run directory has room."""
    if "://" in config.run_uri and not config.run_uri.startswith("file://"):
        return Finding("disk", "ok", f"{config.run_uri} is not on this machine")
    place = Path(storage.filesystem(config.run_uri)[1])
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if free < DISK_GB[1]:
        state: Literal["failure", "warning"] = "failure" if free < DISK_GB[0] else "warning"
        return Finding("disk", state, f"{free:.1f} GiB free in {place}", "free some, or name another --run-dir")
    return Finding("disk", "ok", f"{free:.0f} GiB free in {place}")


def token(config: Config) -> Finding:
    """Whether strangers on the network could run code in the Ray that a run uses."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        what = f"RAY_AUTH_MODE is {mode}: whoever reaches this machine's ports can run code in Ray"
        return Finding("token", "warning", what, "unset RAY_AUTH_MODE")
    if config.cluster.address is None:
        return Finding("token", "ok", "every run makes one of its own")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & (stat.S_IRGRP | stat.S_IROTH):
        return Finding("token", "warning", f"{path} can be read by others", f"chmod 600 {path}")
    if not path.exists() and "RAY_AUTH_TOKEN" not in os.environ:
        what = "a cluster is named, and no token is at hand; one that asks for it will refuse"
        return Finding("token", "warning", what, "set RAY_AUTH_TOKEN_PATH to the cluster's")
    return Finding("token", "ok", "there is one for the cluster")


def address(config: Config) -> Finding:
    """Whether the cluster that is named answers."""
    name = config.cluster.address
    if name is None:
        return Finding("cluster", "ok", "none is named: a run starts Ray on this machine")
    if name in ("auto", "local"):
        return Finding("cluster", "ok", f"{name}: found when the run starts")
    host, _, port = name.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return Finding("cluster", "failure", f"{name} is no address", "cluster.address as in 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        what = f"{name} does not answer ({error.strerror or type(error).__name__})"
        return Finding("cluster", "failure", what, "is it up, and is the port open from here?")
    return Finding("cluster", "ok", f"{name} answers")


def submission(config: Config, job_server: str) -> Finding:
    """Whether a cluster takes jobs, and its nodes hold the plan."""
    from rgalign_ray.ops import jobs

    try:
        jobs.check(jobs.connect(job_server), "loop", config)
    except ConfigError as error:
        return Finding("job server", "failure", str(error), "lower that setting, or add nodes")
    except InfrastructureError as error:
        return Finding(
            "job server", "failure", str(error), "is it up, is the port open from here, is the token its own?"
        )
    return Finding("job server", "ok", f"{job_server} answers, and its nodes hold every stage")


def ports(config: Config) -> Finding:
    """Whether the ports of this machine's cluster and service are free for them, where no cluster is named."""
    if config.cluster.address is not None or local_cluster.running():
        return Finding("ports", "ok", "the cluster has its own")
    wanted = {
        local_cluster.PORT: "rgalign cluster up --port",
        local_cluster.DASHBOARD_PORT: "rgalign cluster up --dashboard-port",
        config.serve.port: "serve.port",
    }
    taken = {port: setting for port, setting in wanted.items() if local_cluster.listens(port)}
    if taken:
        what = f"{', '.join(map(str, taken))} taken by another program"
        return Finding("ports", "warning", what, f"end that one, or choose others by {', '.join(taken.values())}")
    return Finding(
        "ports", "ok", f"{', '.join(map(str, wanted))} are free, for `rgalign cluster up` and `rgalign serve`"
    )


def build_cache(config: Config) -> Finding:
    """Whether a killed build of DeepSpeed's left a lock, on which every later one waits for ever."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    old = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > LOCK_AGE_S]
    if old:
        return Finding("build cache", "failure", f"{old[0]} was left by a build that was killed", f"rm {old[0]}")
    return Finding("build cache", "ok", f"no lock in {root}")


def model(config: Config) -> Finding:
    """Whether the reasoner is at hand."""
    from huggingface_hub import try_to_load_from_cache

    from rgalign_ray.reasoner import models

    name = config.reasoner.model
    try:
        place = models.resolve(name)
    except ConfigError as error:
        return Finding("model", "failure", str(error), "name another by reasoner.model")
    if Path(place).exists():
        return Finding("model", "ok", f"{name} is in {place}")
    if isinstance(try_to_load_from_cache(place, "config.json"), str):
        return Finding("model", "ok", f"{name} is in the hub's cache")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        what = f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
        return Finding("model", "failure", what, f"hf download {name}, where there is a network")
    return Finding("model", "warning", f"{name} is not here yet; the run will fetch it", f"hf download {name}")


def run_folder(config: Config) -> Finding:
    """Whether what is written into the run's folder can be read again."""
    probe = storage.join(config.run_uri, f".doctor-{os.getpid()}")
    said, began = os.urandom(16), time.perf_counter()
    try:
        new = not storage.exists(config.run_uri)
        storage.write_bytes(probe, said)
        fs, path = storage.filesystem(probe)
        with fs.open_input_stream(path) as stream:
            heard = stream.read()
        storage.delete(config.run_uri if new else probe)
    except (OSError, ValueError, DataError) as error:
        reason = first_line(error)
        return Finding(
            "run folder", "failure", f"{config.run_uri} cannot be written ({reason})", "name another --run-dir"
        )
    if heard != said:
        return Finding("run folder", "failure", f"{config.run_uri} gave back other bytes", "name another --run-dir")
    return Finding(
        "run folder", "ok", f"{config.run_uri}: written and read in {(time.perf_counter() - began) * 1e3:.0f} ms"
    )


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    versions,
    vllm,
    processors,
    memory,
    shared_memory,
    disk,
    token,
    address,
    ports,
    build_cache,
    model,
    run_folder,
)
