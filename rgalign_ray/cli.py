"""`rgalign …`: reads the arguments, calls the room that does the work, turns failures into exit codes.

Every command imports what it needs when it runs, so that `rgalign --help` imports neither torch nor ray.
Exit codes: 0 done, 2 a configuration that cannot be run, 3 an input with a fault, 4 infrastructure that
failed for good, 130 interrupted; a bug keeps its traceback and exits with 1.
"""

from __future__ import annotations

import sys
import traceback
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgalign_ray import __version__
from rgalign_ray.errors import (
    ConfigError,
    InfrastructureError,
    UserError,
    is_full_store,
    is_no_space,
    refused_by_storage,
)
from rgalign_ray.ops.verbs import VERBS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rgalign_ray.config import Config
    from rgalign_ray.ops.jobs import Client

INTERRUPTED = 130

app = typer.Typer(
    help="Align a reasoner LLM to a frozen ranker, retrain the ranker on it, repeat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

cluster = typer.Typer(help="A Ray cluster on this machine, for jobs to be submitted to.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")

runs = typer.Typer(help="List run directories, and remove old ones.", no_args_is_help=True)
app.add_typer(runs, name="runs")
Folder = Annotated[str, typer.Argument(help="Folder or URI that holds run directories.")]

ConfigName = Annotated[str, typer.Option("--config", "-c", help="A configuration of the package, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, as in ranker.dim=64; repeatable."),
]
RunDir = Annotated[str | None, typer.Option(help="Folder or URI of the run; overrides run_dir.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Job server, as in http://127.0.0.1:8265; else $RAY_API_SERVER_ADDRESS, else this machine's cluster."
    ),
]
RunName = Annotated[str, typer.Argument(help="Name of the run, or id of its job, as `rgalign status` shows them.")]
Scale = Annotated[float, typer.Option(help="Factor of world.sessions and world.users, of the simulated shop.")]


class Source(StrEnum):
    """Logs that `rgalign prepare` can write."""

    shop = "shop"
    movielens = "movielens"
    tau_retail = "tau_retail"


@app.command()
def loop(
    config: ConfigName = "demo",
    override: Overrides = None,
    run_dir: RunDir = None,
    until: Annotated[str | None, typer.Option(help="Last stage to run, as in rankers_0 or align_1.")] = None,
) -> None:
    """Run the closed loop; the same command again resumes where it stopped."""
    settings = _prepared(config, override, run_dir)
    from rgalign_ray.loop.controller import run

    _resumable(lambda it: run(it, until), settings)


@app.command()
def compare(
    config: ConfigName = "ladder",
    override: Overrides = None,
    run_dir: RunDir = None,
    scale: Scale = 1.0,
    gather: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Only report: a run directory with seeds that are done; repeatable.",
        ),
    ] = None,
) -> None:
    """Compare rankers over several seeds; the same command again resumes where it stopped."""
    settings = _prepared(config, override, run_dir, scale)
    if gather:
        from rgalign_ray.loop.gather import run as tell

        tell(settings, gather)
        return
    from rgalign_ray.loop.compare import run

    _resumable(run, settings)


@app.command()
def serve(config: ConfigName = "demo", override: Overrides = None, run_dir: RunDir = None) -> None:
    """Serve a run's frozen pair over HTTP, until Ctrl-C."""
    settings = _prepared(config, override, run_dir)
    from rgalign_ray.serve.app import run

    run(settings)


@app.command()
def collect(
    out: Annotated[str, typer.Option(help="Folder or URI to write the log's tables into.")],
    config: ConfigName = "demo",
    override: Overrides = None,
    run_dir: RunDir = None,
) -> None:
    """Write a log of what was served and what became of it, for the next run."""
    settings = _prepared(config, override, run_dir)
    if settings.serve.feedback is None:
        raise ConfigError("serve.feedback: names no folder; it is where `rgalign serve` keeps feedback.")
    from rgalign_ray.serve import pair
    from rgalign_ray.serve.collect import COUNTS, collect

    counts = collect(settings.serve.feedback, list(pair.pairs(settings).values()), out)
    for name, count in counts.items():
        if count or name == "sessions":
            print(f"{count:>10,} {COUNTS[name]}")
    tables = f"--set log.uri={out}/sessions --set log.intents={out}/intents.parquet"
    print(f"{out}: a log, for another run with --set log.source=parquet {tables}")


@app.command("read-ahead")
def read_ahead(
    log: Annotated[str, typer.Option(help="Prepared log with the users' situations.")],
    start: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day on which users count as active.")
    ] = None,
    config: ConfigName = "demo",
    override: Overrides = None,
    run_dir: RunDir = None,
) -> None:
    """Read active users' situations ahead of their visit, for the service to look up."""
    settings = _prepared(config, override, run_dir)
    if settings.serve.store is None:
        raise ConfigError("serve.store: names no folder; it is where `rgalign serve` looks vectors up.")
    from rgalign_ray.loop.connection import connect
    from rgalign_ray.serve import pair
    from rgalign_ray.serve.read_ahead import read_ahead as write

    pairs = pair.pairs(settings)
    connect(settings)
    first = None if start is None else f"{start:%Y-%m-%d}"
    read = set()
    for name, spec in pairs.items():
        if spec.reads not in read:
            users = write(spec, log, first, settings.serve.store, settings.encode)
            print(f"{settings.serve.store}: {users:,} users for {name}")
            read.add(spec.reads)


@app.command()
def sweep(
    over: Annotated[str, typer.Option(metavar="KEY=V1,V2,…", help="A setting and its values.")],
    control: Annotated[str | None, typer.Option(help="The one of the values at which no gain is expected.")] = None,
    config: ConfigName = "ladder",
    override: Overrides = None,
    run_dir: RunDir = None,
    scale: Scale = 1.0,
) -> None:
    """Compare rankers at several values of one setting, as `--over world.text_share=0,0.5,1`."""
    key, separator, values = over.partition("=")
    if not separator:
        raise ConfigError(f"--over {over}: expected KEY=V1,V2,…, as in --over world.text_share=0,0.5,1.")
    settings = _prepared(config, override, run_dir, scale)
    from rgalign_ray.loop.sweep import run

    _resumable(lambda it: run(it, key, values.split(","), control), settings)


@app.command()
def tune(config: ConfigName = "ladder", override: Overrides = None, run_dir: RunDir = None, scale: Scale = 1.0) -> None:
    """Try settings for every ranker in a world of its own, and write the configuration to compare with."""
    settings = _prepared(config, override, run_dir, scale)
    from rgalign_ray.loop.tune import run

    _resumable(run, settings)


def _prepared(config: str, override: list[str] | None, run_dir: str | None, scale: float = 1.0) -> Config:
    """The settings of a run, with this process ready for what reads its environment at import."""
    settings = _load(config, override, run_dir, scale)
    from rgalign_ray.loop import environment

    environment.prepare(settings)
    return settings


def _resumable(run: Callable[[Config], object], settings: Config) -> None:
    try:
        run(settings)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command resumes from {settings.run_uri}.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def plan(config: ConfigName = "demo", override: Overrides = None) -> None:
    """Check the settings and the files that they name, and show what every stage will ask of the cluster.

    Nothing is started.
    """
    settings = _load(config, override)
    from rich.console import Console

    from rgalign_ray.loop.log_stages import check_files
    from rgalign_ray.loop.plan import table

    check_files(settings)
    Console().print(table(settings))


@app.command()
def doctor(
    config: ConfigName = "demo",
    override: Overrides = None,
    run_dir: RunDir = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Job server of a cluster that shall hold the run instead."),
    ] = None,
) -> None:
    """Check whether this machine, or the cluster that is named, can hold a run; exits with 4 when it cannot."""
    settings = _load(config, override, run_dir)
    if address is not None:
        _with_token()
    from rich.console import Console

    from rgalign_ray.ops.doctor import examine

    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    console, failed = Console(), False
    for finding in examine(settings, address):
        failed |= finding.state == "failure"
        head = f"[{colours[finding.state]}]{finding.state:7}[/] {finding.check}: "
        console.print(head, end="", soft_wrap=True)
        console.print(finding.what, markup=False, highlight=False, soft_wrap=True)
        if finding.way_out:
            console.print(f"        → {finding.way_out}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(InfrastructureError.exit_code)


@app.command()
def lineage(run_dir: Annotated[str, typer.Argument(help="Folder or URI of a run.")]) -> None:
    """Show what every artefact of a run was made of, and the versions of its reasoners and rankers."""
    from rich.console import Console

    from rgalign_ray.loop.lineage import WIDTH, table

    Console(width=max(Console().width, WIDTH)).print(table(run_dir))


@app.command()
def prepare(
    source: Annotated[Source, typer.Argument(help="Which log to write.")],
    out: Annotated[str, typer.Option(help="Folder or URI to write the log's tables into.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder with the source's files, of movielens or tau_retail."),
    ] = None,
    config: ConfigName = "demo",
    override: Overrides = None,
) -> None:
    """Write a log's tables: the simulated shop's, MovieLens-100k's or τ-bench retail's."""
    overrides = [*(override or []), f"log.source={source}"]
    if folder is not None:
        if source is Source.shop:
            raise ConfigError("--folder: the shop is simulated and reads no files; leave it out.")
        overrides.append(f"log.uri={folder.absolute()}")
    settings = _load(config, overrides)
    from rgalign_ray import storage
    from rgalign_ray.loop import log_stages
    from rgalign_ray.loop.stage import Run

    # files of another log have other names, so they would stay and be read as a part of this one
    if storage.list_files(out):
        raise ConfigError(f"--out: {out} is not empty; name another folder, or remove it.")
    with storage.writable(out, "--out"):
        counts = log_stages.stages(settings)[0].run(Run(settings), out).rows
    print(f"{out}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")


@app.command("config")
def show_config(config: ConfigName = "demo", override: Overrides = None) -> None:
    """Print every setting with its value, and what it is for, as YAML; the output is itself a valid --config file."""
    from rgalign_ray.config import commented

    print(commented(_load(config, override)))


@cluster.command()
def up(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes in all: one head, the others beside it.")] = 1,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs that each node declares; else an even share of this machine's.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address of this machine that nodes of other machines may join.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the head, which other nodes join.")] = 6379,
    dashboard_port: Annotated[int, typer.Option(help="Port of the dashboard, to which jobs are submitted.")] = 8265,
) -> None:
    """Start a Ray cluster on this machine, and keep it until `rgalign cluster down`."""
    from rgalign_ray.ops import local_cluster

    if host != local_cluster.LOOPBACK:
        print(f"warning: whoever reaches {host} and knows the token can run code here.", file=sys.stderr)
    started = local_cluster.up(nodes, cpus, host, port, dashboard_port)
    print(f"{len(started.nodes)} node(s) at {started.address}; jobs are submitted to {started.dashboard}")
    print("rgalign submit loop --config smoke     then: rgalign status, logs, stop, resume; rgalign cluster down")


@cluster.command()
def add(
    cpus: Annotated[int, typer.Option(min=1, help="CPUs that the node declares.")] = 1,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="As node_labels ask for it; repeatable.")
    ] = None,
) -> None:
    """Start one more node of the cluster that is up here."""
    from rgalign_ray.ops import local_cluster

    labels = dict(_label(each) for each in label or [])
    print(f"{len(local_cluster.add(cpus, labels).nodes)} node(s) by now")


def _label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigError(f"--label {text}: expected NAME=VALUE, as in --label rgalign=rollout.")
    return name, value


@cluster.command()
def down() -> None:
    """End what `rgalign cluster up` has started, and no other Ray."""
    from rgalign_ray.ops import local_cluster

    print(f"{local_cluster.down()} node(s) ended")


@app.command()
def submit(
    verb: Annotated[str, typer.Argument(help=f"One of {', '.join(VERBS)}.")],
    config: ConfigName = "demo",
    override: Overrides = None,
    run_dir: RunDir = None,
    scale: Scale = 1.0,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Show its logs, and end with its exit status.")] = True,
) -> None:
    """Run a verb as a job of a Ray cluster; the same command again resumes where it stopped."""
    settings = _load(config, override, run_dir, scale)
    _with_token()
    from rgalign_ray.ops import jobs

    if verb not in VERBS:
        raise ConfigError(f"submit {verb}: not one of {', '.join(VERBS)}.")
    client = jobs.connect(address)
    jobs.check(client, verb, settings)
    _follow(client, jobs.submit(client, verb, settings, say=_tell), wait)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Only the jobs of this run.")] = None, address: Address = None
) -> None:
    """Show the jobs of a cluster."""
    _with_token()
    from rich.console import Console

    from rgalign_ray.ops import jobs

    Console().print(jobs.table(jobs.list_jobs(jobs.connect(address), name)))


@app.command()
def logs(name: RunName, address: Address = None) -> None:
    """Show the logs of a run's last job, and go on until it ends."""
    _with_token()
    from rgalign_ray.ops import jobs

    client = jobs.connect(address)
    _follow(client, jobs.latest(client, name).id, wait=True)


@app.command()
def stop(name: RunName, address: Address = None) -> None:
    """End a run's job; what it has finished stays, and `rgalign resume` goes on."""
    _with_token()
    from rgalign_ray.ops import jobs

    client = jobs.connect(address)
    job = jobs.latest(client, name)
    print(f"{job.id}: {'stopped' if jobs.stop(client, job.id) else f'was over ({job.status.lower()})'}")


@app.command()
def resume(
    name: RunName,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Show its logs, and end with its exit status.")] = True,
) -> None:
    """Submit a run's last job again, with its settings; it goes on where that one stopped."""
    _with_token()
    from rgalign_ray.ops import jobs

    client = jobs.connect(address)
    _follow(client, jobs.resume(client, jobs.latest(client, name, over=True), say=_tell), wait)


def _with_token() -> None:
    """Has the user's token at hand for clusters; before ray is imported, which reads the mode as it is."""
    from rgalign_ray.loop import environment

    environment.use_token_if_present()


def _follow(client: Client, job_id: str, wait: bool) -> None:
    """Shows a job's logs until it ends and exits with its status; an interrupt may end the job, or leave it."""
    from rgalign_ray.ops import jobs

    _tell(f"job {job_id}")
    if not wait:
        return
    try:
        code = jobs.follow(client, job_id, sys.stdout.write)
    except KeyboardInterrupt:
        _tell("")
        if sys.stdin.isatty() and typer.confirm(f"Stop {job_id} as well?", err=True):
            jobs.stop(client, job_id)
            _tell(f"{job_id} is stopped; `rgalign resume` goes on where it was.")
        else:
            _tell(f"{job_id} goes on; `rgalign logs` shows it again.")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(code)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@runs.command("list")
def list_runs(folder: Folder = "runs") -> None:
    """Show the runs in a folder, the latest last."""
    from rich.console import Console

    from rgalign_ray.ops import runs as folders

    there = folders.list_runs(folder)
    Console().print(folders.table(there, f"{len(there)} runs in {folder}"))


@runs.command()
def prune(
    folder: Folder = "runs",
    keep: Annotated[int, typer.Option(min=0, help="So many of the latest runs stay, however old.")] = 5,
    older_than_days: Annotated[float, typer.Option(min=0.0, help="Only runs unchanged for so many days.")] = 30.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only shown.")] = False,
) -> None:
    """Remove whole runs that are old and not among the latest."""
    from rich.console import Console

    from rgalign_ray.ops import runs as folders

    there = folders.list_runs(folder)
    stale = folders.stale(there, keep, older_than_days, datetime.now(UTC))
    what = "removed" if yes else "to remove; --yes does it"
    Console().print(folders.table(stale, f"{len(stale)} of {len(there)} runs in {folder} {what}"))
    for run in stale if yes else ():
        folders.remove(run)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """The console script: runs `app`, and turns the package's own errors into one line and an exit code."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except InfrastructureError as error:
        if error.__cause__ is not None:  # what a worker met, with where it was
            traceback.print_exception(error)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if is_no_space(error):
            told = "no space is left on the disk; free some, and the same command goes on."
        elif is_full_store(error):
            told = "cluster.object_store_mb: Ray's object store is too small; raise it, and the same command goes on."
        elif said := refused_by_storage(error):
            told = f"storage: {said} Its keys and its address come from the environment; the same command goes on."
        else:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(InfrastructureError.exit_code)


def _load(name_or_path: str, overrides: list[str] | None, run_dir: str | None = None, scale: float = 1.0) -> Config:
    from rgalign_ray.config import changed, load

    settings = load(name_or_path, overrides)
    if scale != 1.0:
        settings = settings.scaled(scale)
    return settings if run_dir is None else changed(settings, {"run_dir": run_dir})


if __name__ == "__main__":
    main()
