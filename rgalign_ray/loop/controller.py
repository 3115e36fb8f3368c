"""The controller: runs the stages that are not done yet, in order.

  for each stage:  key = hash(its settings, keys of its inputs)
                   manifest with that key?  ── yes ──▶ skip
                                            └─ no ───▶ run into a folder beside, write the manifest, rename

Killed anywhere, the same command skips what is whole and redoes the rest: a stage sees nothing but its
settings and its inputs, so what comes out is the same.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from functools import reduce
from operator import getitem
from typing import Any

from rich.console import Console

from rgalign_ray import __version__, progress, storage
from rgalign_ray.config import Config, Settings
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import audit_stages, plan, summary
from rgalign_ray.loop.connection import connect, nodes
from rgalign_ray.loop.meter import PeakMemory
from rgalign_ray.loop.stage import RECORDS, Run, Stage
from rgalign_ray.loop.stages import stages
from rgalign_ray.loop.tracking import Tracker
from rgalign_ray.reasoner import models

console = Console(stderr=True)
TABLE_WIDTH = 128
"""Columns that the headline needs; a narrower terminal wraps its lines rather than losing figures."""


def run(config: Config, until: str | None = None) -> Run:
    """Runs the closed loop to its end; what an earlier run finished under equal settings is skipped.

    Args:
        config: the run.
        until: last stage to run, or the name that several begin with, as in `align_1`; None: all, and the report.

    Raises:
        ConfigError: when the cluster cannot hold the plan, the model is not there, or no stage is named so.
        DataError: when the log has a structural fault.
    """
    count = stages_through(stages(config), until) if until else None
    job = Run(settle(config))
    console.print(plan.table(job.config, nodes(config)))
    tracker = Tracker(job.config)
    if count is not None:
        run_stages(job, stages(job.config), until=count, tracker=tracker)
    else:
        job = settle_rounds(job, tracker)
        run_stages(job, stages(job.config), tracker=tracker)
        show(job)
    tracker.end()
    return job


def stages_through(sequence: list[Stage], name: str) -> int:
    """How many stages there are up to the last of a name, or of those that begin with it.

    Raises:
        ConfigError: when none does.
    """
    names = [stage.name for stage in sequence]
    found = [number for number, stage in enumerate(names, 1) if stage == name or stage.startswith(f"{name}_")]
    if not found:
        raise ConfigError(f"--until {name}: no such stage; there are {', '.join(names)}.")
    return found[-1]


def settle_rounds(job: Run, tracker: Tracker | None = None) -> Run:
    """The run as it ends, with the rounds that it has; with `early_stop` those are run as far as it takes to know."""
    config = job.config
    for round_ in range(1, config.rounds) if config.early_stop else ():
        sequence = stages(config)
        names = [stage.name for stage in sequence]
        known = names.index(audit_stages.queries_of(round_)) + 1
        run_stages(job, sequence, until=known, tracker=tracker)
        gain = audit_stages.gain(job, round_).mean
        if gain <= 0:
            console.print(f"[bold]round {round_} is the last[/bold]: the auditor sees {gain:+.4f} in its queries")
            return replace(job, config=config.model_copy(update={"rounds": round_}))
    return job


def run_stages(job: Run, sequence: list[Stage], until: int | None = None, tracker: Tracker | None = None) -> None:
    """Runs those of a run's stages that are not done, in order; `until` leaves out the later ones."""
    config = job.config
    remember(job)
    if config.cluster.address is None:
        plan.check_cluster(config, nodes(config))
    for number, stage in enumerate(sequence[:until], 1):
        key = stage_key(job, stage)
        head = f"[bold]{number:2d}/{len(sequence)} {stage.name}[/bold] · {stage.does}"
        if is_done(job, stage, key):
            console.print(f"{head} · [dim]done already[/dim]")
            if stage.changed and (told := stage.changed(job)):
                console.print(f"      [yellow]{told}[/yellow]")
            if tracker:
                tracker.stage(job.manifest(stage.name))
            continue
        console.print(head)
        storage.keep_only(job.uri(RECORDS), key)  # others are of a try that was killed, under other settings
        if stage.ray:
            connect(config)
        manifest = execute(job, stage, key)
        counts = ", ".join(f"{value:,} {name}" for name, value in manifest.rows.items())
        console.print(f"      {progress.clock(manifest.seconds)} · {counts}")
        if tracker:
            tracker.stage(manifest)


def remember(job: Run) -> None:
    """Writes the run's configuration into its directory."""
    storage.write_json(job.uri("config.json"), job.config.model_dump(mode="json"))


def is_done(job: Run, stage: Stage, key: str) -> bool:
    """Whether the stage's artefact is there, made of the very inputs and settings that `key` stands for."""
    manifest = storage.read_manifest(job.uri(stage.name))
    return manifest is not None and manifest.key == key


def settle(config: Config) -> Config:
    """The configuration with what depends on the machine decided: once for a run, wherever it is resumed.

    Raises:
        ConfigError: when the package that holds the model, or vLLM, is not installed, before a worker finds that out;
            when the run directory cannot be written.
    """
    models.resolve(config.reasoner.model)
    if config.evaluate.hit_rate_sessions or config.roles.audit:
        models.resolve(config.compare.encoder.model)
    samplers = {config.reasoner.engine, *(teacher.engine for teacher in config.teachers)}
    elsewhere = config.reasoner.vllm.python or config.cluster.address
    if "vllm" in samplers and not elsewhere and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "reasoner.engine: vllm is not installed here; install it, or name the interpreter of an environment that "
            "has it by reasoner.vllm.python."
        )
    place = storage.join(config.run_uri, "settled.json")
    with storage.writable(config.run_uri, "run_dir"):
        if not storage.exists(place):
            storage.write_json(place, {"dtype": models.settle(config.reasoner).dtype})
    reasoner, learner = config.reasoner, config.learner
    if reasoner.dtype == "auto":
        reasoner = reasoner.model_copy(update={"dtype": storage.read_json(place)["dtype"]})
    if learner.bf16 == "auto":
        learner = learner.model_copy(update={"bf16": reasoner.dtype == "bfloat16"})
    roles = config.roles.model_copy(update={"slices": config.roles.slices or config.rounds})
    return config.model_copy(update={"reasoner": reasoner, "learner": learner, "roles": roles})


def show(job: Run) -> None:
    """Writes the report and prints its headline, comparisons and examples."""
    from rgalign_ray.evaluate import report_page, report_text

    made = summary.report(job)
    place = report_page.write(job.uri("report.html"), made)
    out = Console(width=max(Console().width, TABLE_WIDTH))
    for part in (report_text.headline(made), report_text.comparisons(made), report_text.examples(made)):
        out.print(part)
    out.print("\n".join(made.summary))
    out.print(f"report: {place}")


def stage_key(job: Run, stage: Stage) -> str:
    """Hash of everything that decides what the stage writes."""
    settings = deciding(job.config)
    # a name stands for a file, or a folder, and what is in it may change under the same name
    settings["features"] = FeatureSpec.load(job.config.features.spec).key
    settings["prompt"]["template"] = Template.load(job.config.prompt.template).key
    for reasoner in (settings["reasoner"], settings["compare"]["encoder"]):
        reasoner["model"] = models.identity(reasoner["model"])
    for teacher in settings["teachers"]:
        if teacher["model"]:
            teacher["model"] = models.identity(teacher["model"])
        if teacher["template"]:
            teacher["template"] = Template.load(teacher["template"]).key
    chosen = {name: reduce(getitem, name.split("."), settings) for name in ("seed", *stage.settings)}
    return storage.content_key(__version__, stage.name, chosen, {name: job.manifest(name).key for name in stage.inputs})


def deciding(config: Config) -> dict[str, Any]:
    """Sections of settings, without those that decide no result."""
    settings = config.model_dump(mode="json")
    for name, section in config:
        for aside in section.ASIDE if isinstance(section, Settings) else ():
            del settings[name][aside]
    return settings


def execute(job: Run, stage: Stage, key: str) -> storage.Manifest:
    """Runs one stage into a folder beside its place, and renames that when it is whole."""
    started = time.monotonic()
    resume_key = key if stage.units else None
    with PeakMemory() as memory, storage.writing(job.uri(stage.name), resume_key=resume_key) as work:
        outcome = stage.run(replace(job, stage_key=key), work)
        manifest = storage.Manifest(
            stage=stage.name,
            key=key,
            inputs={name: job.manifest(name).key for name in stage.inputs},
            rows=outcome.rows,
            figures=outcome.figures,
            seconds=round(time.monotonic() - started, 1),
            peak_memory_mb=round(memory.peak_mb),
        )
        storage.write_json(storage.join(work, storage.MANIFEST), manifest.model_dump())
    storage.delete(job.uri(RECORDS, key))  # and no more: slices of a comparison run beside each other
    return manifest
