"""`rgalign …`: reads the arguments, calls the room that does the work, turns failures into exit codes.

Every command imports what it needs when it runs, so that `rgalign --help` imports neither torch nor ray.
Exit codes: 0 done, 2 a configuration that cannot be run, 3 an input with a fault, 4 infrastructure that
failed for good, 130 interrupted; a bug keeps its traceback and exits with 1.
"""

from __future__ import annotations

import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgalign_ray import __version__
from rgalign_ray.errors import ConfigError, InfrastructureError, UserError, is_no_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from rgalign_ray.config import Config

INTERRUPTED = 130

app = typer.Typer(
    help="Align a reasoner LLM to a frozen ranker, retrain the ranker on it, repeat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigName = Annotated[str, typer.Option("--config", "-c", help="A configuration of the package, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, as in ranker.dim=64; repeatable."),
]
RunDir = Annotated[str | None, typer.Option(help="Folder or URI of the run; overrides run_dir.")]
Scale = Annotated[float, typer.Option(help="Times as many sessions and users of the simulated shop as configured.")]


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
    config: ConfigName = "ladder", override: Overrides = None, run_dir: RunDir = None, scale: Scale = 1.0
) -> None:
    """Compare rankers over several seeds; the same command again resumes where it stopped."""
    settings = _prepared(config, override, run_dir, scale)
    from rgalign_ray.loop.compare import run

    _resumable(run, settings)


@app.command()
def sweep(
    over: Annotated[str, typer.Option(metavar="KEY=V1,V2,…", help="A setting and its values.")],
    control: Annotated[str | None, typer.Option(help="One of the values, at which nothing should be gained.")] = None,
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
    settings = _load(config, override)
    if scale != 1.0:
        settings = settings.scaled(scale)
    if run_dir is not None:
        settings = settings.model_copy(update={"run_dir": run_dir})
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
    """Show what every stage will ask of the cluster, without starting anything."""
    settings = _load(config, override)
    from rich.console import Console

    from rgalign_ray.loop.plan import table

    Console().print(table(settings))


@app.command()
def doctor(config: ConfigName = "demo", override: Overrides = None, run_dir: RunDir = None) -> None:
    """Check whether this machine, or the cluster that is named, can hold a run; exits with 4 when it cannot."""
    settings = _load(config, override)
    if run_dir is not None:
        settings = settings.model_copy(update={"run_dir": run_dir})
    from rich.console import Console

    from rgalign_ray.ops.doctor import examine

    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    console, failed = Console(), False
    for finding in examine(settings):
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
    folder: Annotated[Path | None, typer.Option(help="With the files of movielens or tau_retail.")] = None,
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
    from rgalign_ray.loop import log_stages
    from rgalign_ray.loop.stage import Run

    counts = log_stages.stages(settings)[0].run(Run(settings), out).rows
    print(f"{out}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")


@app.command("config")
def show_config(config: ConfigName = "demo", override: Overrides = None) -> None:
    """Print the whole resolved configuration as YAML; the output is itself a valid --config file."""
    import yaml

    print(yaml.safe_dump(_load(config, override).model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


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
        traceback.print_exception(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_no_space(error):
            raise
        print("error: no space is left on the disk; free some, and the same command goes on.", file=sys.stderr)
        sys.exit(InfrastructureError.exit_code)


def _load(name_or_path: str, overrides: list[str] | None) -> Config:
    from rgalign_ray.config import load

    return load(name_or_path, overrides)


if __name__ == "__main__":
    main()
