"""Verbs of the command line as jobs of a Ray cluster: packed here, run there, followed and stopped from anywhere.

submit ─ check the plan ─ pack settings and code ─▶ job server ─▶ head: `rgalign VERB --config run.yaml`
   ▲                                                                  │ logs, exit status
   └──────────────────────────────────────────────────────────────────┘

A run is known by its run directory: a job that is submitted again for it goes on where the last one ended, also on
another cluster. What a job cannot have done twice, two jobs may not do at once: while one is at work on a run
directory, the cluster is not given another.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

import rgalign_ray
from rgalign_ray import config as configuration
from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.config.base import absolute
from rgalign_ray.errors import ConfigError, InfrastructureError, first_line
from rgalign_ray.loop import log_stages, plan
from rgalign_ray.ops import local_cluster
from rgalign_ray.ops.verbs import VERBS
from rgalign_ray.progress import clock
from rgalign_ray.serve.access import VARIABLE

if TYPE_CHECKING:
    from rich.table import Table

MAX_PACKAGE_MB = 50.0
"""Code and settings are a few; more is a file that was not meant."""
SETTINGS, FILES = "run.yaml", "files"
"""The settings that travel, and the folder of the files that they name."""
ENTRY = ("python", "-m", "rgalign_ray.cli")
RUN, VERB, RUN_DIR, CONFIG = "rgalign_run", "rgalign_verb", "rgalign_run_dir", "rgalign_config"
"""Metadata of a job."""
MAX_NODES = 10_000
"""That Ray's state API lists."""
ENDED_DEADLINE_S = 30.0
"""For a job's end, after its logs have ended or it was told to stop."""
AGENT_DEADLINE_S = 60.0
"""For a head that has just started to be able to take jobs."""
NO_AGENT = "No available agent"
"""What it says until then."""
ASK_EVERY_S = 0.5
SIGNALLED = 128
"""Exit statuses from here on, and those below 0, are of processes that a signal ended."""
SERVES = "serve"
"""The verb that only reads its run directory: others may write there meanwhile, and it takes up what they make."""
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray's that tell of every file and socket."""
Client: TypeAlias = JobSubmissionClient
REFUSALS = (ConnectionError, RuntimeError, AuthenticationError)
"""What Ray's client raises when it is not answered, or not served."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a cluster that this package has submitted."""

    id: str
    name: str
    verb: str
    run_dir: str
    status: str
    message: str
    exit_code: int | None
    started: float
    """Seconds since 1970."""
    ended: float | None

    @property
    def over(self) -> bool:
        return JobStatus(self.status).is_terminal()


def connect(address: str | None) -> Client:
    """A client of the job server at `address`, else of $RAY_API_SERVER_ADDRESS, else of this machine's cluster.

    Raises:
        ConfigError: when there is none to talk to.
        InfrastructureError: when it does not answer, or refuses the token.
    """
    here = local_cluster.running()
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or (here.dashboard if here else None)
    if address is None:
        raise ConfigError("--address: no cluster is named, and none is up here; `rgalign cluster up` starts one.")
    for chatty in CHATTY:  # `submit` tells what travels
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with _asking(address):
        return JobSubmissionClient(address)


@contextmanager
def _asking(address: str) -> Iterator[None]:
    """A cluster that does not answer, or refuses, is an `InfrastructureError`."""
    try:
        yield
    except REFUSALS as error:
        raise InfrastructureError(f"--address {address}: {first_line(error)}") from None


def check(client: Client, verb: str, config: Config) -> None:
    """Refuses a verb whose plan the cluster could never place, before anything is sent.

    Raises:
        ConfigError: with what is asked for and what is there.
        InfrastructureError: when the cluster does not say what it has.
    """
    try:
        found = list_nodes(address=client.get_address(), limit=MAX_NODES, detail=True, raise_on_missing_output=False)
    except RayStateApiException as error:
        raise InfrastructureError(f"--address {client.get_address()}: {first_line(error)}") from None
    nodes = [
        plan.Node(node.labels or {}, node.resources_total.get("CPU", 0.0), node.resources_total.get("GPU", 0.0))
        for node in found
        if node.state == "ALIVE"
    ]
    if verb == SERVES:
        plan.check_served(config, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    else:
        plan.check_cluster(config, nodes)


def submit(
    client: Client,
    verb: str,
    config: Config,
    say: Callable[[str], None] = print,
) -> str:
    """Packs a run and hands it to the cluster.

    What travels: this package's code, the settings, and the files that they name; nothing else of this machine.

    Args:
        client: of the cluster.
        verb: one of `VERBS`.
        config: whole; its run directory must be one that the cluster's nodes see.
        say: told what travels.

    Returns:
        the job's id.

    Raises:
        ConfigError: when a job of this run directory is at work there, when what would travel is too large, and for a
            service whose keys would not.
        InfrastructureError: when the cluster does not take it.
    """
    if verb == SERVES and config.serve.keys is None and os.environ.get(VARIABLE):
        raise ConfigError(
            f"${VARIABLE}: what this machine's environment holds does not travel, and the service would answer "
            "everybody; name a file of keys on the cluster's head by serve.keys, or unset it."
        )
    here = [job for job in list_jobs(client) if _same(job.run_dir, config.run_uri) and not job.over]
    busy = [job for job in here if SERVES not in (verb, job.verb)]
    if busy:
        raise ConfigError(
            f"run_dir: {busy[0].id} is at work on {config.run_uri}; `rgalign logs {busy[0].id}` shows it, and "
            f"`rgalign stop {busy[0].id}` ends it."
        )
    up = [job for job in list_jobs(client) if verb == job.verb == SERVES and not job.over]
    if up:
        raise ConfigError(f"serve: {up[0].id} serves on this cluster; `rgalign stop {up[0].id}` ends it.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name)  # a job's id is part of addresses
    with tempfile.TemporaryDirectory(prefix="rgalign-submit-") as folder:
        files = pack(config, Path(folder))
        size = sum(file.stat().st_size for file in files) / 1e6
        named = [file.name for file in files if Path(folder, FILES) in file.parents]
        what = ", ".join([f"rgalign_ray {rgalign_ray.__version__}", SETTINGS, *named])
        say(f"sending {len(files)} files, {size:.1f} MB: {what}; nothing else of this machine")
        if size > MAX_PACKAGE_MB:
            largest = max(files, key=lambda file: file.stat().st_size)
            raise ConfigError(
                f"submit: {size:.0f} MB would travel, above {MAX_PACKAGE_MB:.0f}; the largest file is "
                f"{largest.relative_to(folder)} ({largest.stat().st_size / 1e6:.0f} MB)."
            )
        request = {
            "entrypoint": " ".join([*ENTRY, *VERBS[verb], "--config", SETTINGS, "--set", "cluster.address=auto"]),
            "submission_id": f"{name}-{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
            "runtime_env": {"working_dir": folder},
            "metadata": {
                RUN: config.name,
                VERB: verb,
                RUN_DIR: config.run_uri,
                CONFIG: json.dumps(anywhere(config)),
            },
        }
        with _asking(client.get_address()):
            return _taken(client, request)


def _taken(client: Client, request: dict[str, Any]) -> str:
    """The id of a job that the cluster has taken; a head that has just started may have no agent yet."""
    until = time.monotonic() + AGENT_DEADLINE_S
    while True:
        try:
            return client.submit_job(**request)
        except REFUSALS as error:
            if NO_AGENT not in str(error) or time.monotonic() > until:
                raise
        time.sleep(ASK_EVERY_S)


def pack(config: Config, folder: Path) -> list[Path]:
    """Lays out what travels in `folder` and returns its files.

    Files that the settings name come along under `files/`, and are named there in the settings that travel.

    Raises:
        ConfigError: for one that is missing or cannot be read.
    """
    log_stages.check_files(config)
    package = Path(rgalign_ray.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    data = anywhere(config)
    for section, key in _files(data):
        named = section[key]
        target = Path(FILES, f"{storage.content_key(named)}-{Path(named).name}")
        (folder / target.parent).mkdir(exist_ok=True)
        shutil.copyfile(named, folder / target)
        section[key] = str(target)
    (folder / SETTINGS).write_text(json.dumps(data, indent=2))
    return sorted(file for file in folder.rglob("*") if file.is_file())


def anywhere(config: Config) -> dict[str, Any]:
    """The settings as plain data that mean the same in every folder: paths are absolute."""
    data = config.model_dump(mode="json") | {"run_dir": config.run_uri}
    for section, key in [*_files(data), *_places(data)]:
        if section[key]:
            section[key] = absolute(section[key])
    return data


def _places(data: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where settings name folders and files that do not travel, likewise: the cluster's nodes must see them."""
    places = [(data["log"], key) for key in ("uri", "intents", "candidate_sets")]
    places.append((data["encode"], "kept"))
    llms = [data["reasoner"], data["compare"]["encoder"], *data["teachers"]]
    return places + [(llm, "model") for llm in llms if os.path.isdir(llm["model"] or "")]


def _files(data: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where settings name files of this machine: a section of them, and a key in it."""
    places = [(data["features"], "spec"), *((each, "template") for each in [data["prompt"], *data["teachers"]])]
    return [(section, key) for section, key in places if (section[key] or "").endswith((".yaml", ".yml"))]


def list_jobs(client: Client, name: str | None = None) -> list[Job]:
    """The jobs of this package that the cluster knows, of one run, or the one of an id, if named; the latest last."""
    with _asking(client.get_address()):
        found = [_job(details) for details in client.list_jobs() if RUN in (details.metadata or {})]
    return sorted((job for job in found if name in (None, job.name, job.id)), key=lambda job: job.started)


def latest(client: Client, name: str, *, over: bool = False) -> Job:
    """The last job of a run: of those at work if there are any, or, to go on with one, of those that are over.

    Args:
        name: of the run, or the job's id.

    Raises:
        ConfigError: when the cluster knows none.
    """
    found = list_jobs(client, name)
    if not found:
        known = ", ".join(sorted({job.name for job in list_jobs(client)})) or "none"
        raise ConfigError(
            f"{name}: no run of that name on {client.get_address()} (there: {known}). One of another cluster goes on "
            "by `rgalign submit` with its run directory."
        )
    return next((job for job in reversed(found) if job.over == over), found[-1])


def follow(client: Client, job_id: str, out: Callable[[str], Any]) -> int:
    """Passes a job's logs on until it ends.

    Returns:
        the exit status of its driver; that of `InfrastructureError` where it has none, or a signal ended it.

    Raises:
        InfrastructureError: when the cluster stops answering.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            out(text)

    try:
        asyncio.run(tail())
        job = _ended(client, job_id)
    except (aiohttp.ClientError, *REFUSALS) as error:
        raise InfrastructureError(
            f"--address {client.get_address()}: the cluster does not answer ({first_line(error)}); the run goes on, "
            "or is taken up by the same command."
        ) from None
    if job.exit_code is None and job.status != JobStatus.SUCCEEDED:
        out(f"{job.id}: {job.status.lower()}. {job.message}\n")
    if job.exit_code is None:
        return 0 if job.status == JobStatus.SUCCEEDED else InfrastructureError.exit_code
    # a driver that a signal ended, as one that was out of memory
    return job.exit_code if 0 <= job.exit_code < SIGNALLED else InfrastructureError.exit_code


def stop(client: Client, job_id: str) -> bool:
    """Ends a job and waits until it has ended; what its run has finished stays.

    Returns:
        whether it was running.

    Raises:
        InfrastructureError: when the cluster does not answer, or the job does not end.
    """
    with _asking(client.get_address()):
        if not client.stop_job(job_id):
            return False
        if not _ended(client, job_id).over:
            raise InfrastructureError(f"{job_id}: told to stop, and still at work after {ENDED_DEADLINE_S:.0f} s.")
        return True


def resume(client: Client, job: Job, say: Callable[[str], None] = print) -> str:
    """Submits a job's run again, with the settings that it had and this machine's code."""
    with _asking(client.get_address()):
        metadata = client.get_job_info(job.id).metadata or {}
    config = configuration.validate(json.loads(metadata[CONFIG]))
    return submit(client, job.verb, config, say)


def table(found: list[Job]) -> Table:
    """Jobs for the terminal, the latest last."""
    from rich.table import Table

    shown = Table(title=f"{len(found)} jobs", title_justify="left")
    for column in ("run", "verb", "state", "started", "took"):
        shown.add_column(column, no_wrap=True)
    shown.add_column("run directory, job", overflow="fold")
    for job in found:
        state = job.status.lower() + (f" ({job.exit_code})" if job.exit_code else "")
        took = clock((job.ended or time.time()) - job.started)
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        shown.add_row(job.name, job.verb, state, began, took, f"{job.run_dir}\n{job.id}")
    return shown


def _same(one: str, other: str) -> bool:
    """Whether two run directories are one."""
    return one.rstrip("/") == other.rstrip("/")


def _ended(client: Client, job_id: str) -> Job:
    """The job once it has ended, or as it is when the deadline has passed."""
    until = time.monotonic() + ENDED_DEADLINE_S
    while not (job := _job(client.get_job_info(job_id))).over and time.monotonic() < until:
        time.sleep(ASK_EVERY_S)
    return job


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        name=metadata.get(RUN, ""),
        verb=metadata.get(VERB, ""),
        run_dir=metadata.get(RUN_DIR, ""),
        status=details.status.value,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
    )
