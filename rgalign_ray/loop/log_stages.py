"""Stages from a source to sessions that rankers can read: log, sessions, features."""

from __future__ import annotations

import numpy as np

from rgalign_ray import progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs import examples, ingest, source, stream
from rgalign_ray.logs.catalogue import CANDIDATE_SETS_FILE, INTENTS_FILE
from rgalign_ray.logs.features import FeatureSpace, FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.stage import Outcome, Run, Stage

WORDINGS = {"valid": 1, "test": 2}
"""Wording sets of the shop's texts: what validates and tests is phrased as nothing that trains."""


def stages(config: Config) -> list[Stage]:
    """log (where this project makes it), sessions, features."""
    sequence = []
    if config.log.source == "shop":
        sequence.append(Stage("log", "simulate the shop", make_shop, ("world", "roles", "log"), ()))
    elif config.log.source == "movielens":
        sequence.append(Stage("log", "prepare MovieLens-100k", make_movielens, ("log",), ()))
    elif config.log.source == "tau_retail":
        sequence.append(Stage("log", "prepare τ-bench retail", make_tau_retail, ("log",), ()))
    made = tuple(stage.name for stage in sequence)
    return [
        *sequence,
        Stage(
            "sessions",
            "validate, quarantine, assign roles",
            ingest_sessions,
            ("log", "roles", "features"),
            made,
            changed=log_changed,
        ),
        Stage("features", "fit the feature space", fit_features, ("features", "log"), ("sessions",), ray=True),
    ]


def make_shop(run: Run, out: str) -> Outcome:
    from rgalign_ray.world.generate import generate

    config = run.config

    def wording_of(users: list[str], ts: np.ndarray) -> np.ndarray:
        roles = ingest.role_of(users, ts, config.roles, config.align_slices, last_day(config))
        return np.array([WORDINGS.get(role, 0) for role in roles])

    with progress.track("shop", config.world.days, "days") as advance:
        return Outcome(
            rows=generate(
                config.world,
                out,
                wording_of=wording_of,
                on_day=lambda sessions: advance(1),
                test_days=config.roles.test_days,
            )
        )


def make_movielens(run: Run, out: str) -> Outcome:
    from rgalign_ray.logs.sources import movielens
    from rgalign_ray.reasoner.models import cache_dir

    folder = run.config.log.uri or movielens.fetch(cache_dir())
    return Outcome(rows=movielens.prepare(folder, out))


def make_tau_retail(run: Run, out: str) -> Outcome:
    from rgalign_ray.logs.sources import tau_retail

    log = run.config.log
    if log.uri is None:
        raise ConfigError("log.uri: not set; expected the folder of τ-bench retail, with users.json and orders.json.")
    return Outcome(rows=tau_retail.prepare(log.uri, log.tau_retail, out))


def ingest_sessions(run: Run, out: str) -> Outcome:
    config = run.config
    log = config.log
    if log.source == "parquet":
        assert log.uri is not None and log.intents is not None
        sources = (log.uri, log.intents, log.candidate_sets)
    else:
        sets = run.uri("log", CANDIDATE_SETS_FILE)
        sources = (run.uri("log", "sessions"), run.uri("log", INTENTS_FILE), sets if storage.exists(sets) else None)
    spec = FeatureSpec.load(config.features.spec)
    stamp = {"log": _stamp(config)} if log.source == "parquet" else {}  # before: what comes meanwhile is not read
    summary = ingest.ingest(
        *sources,
        out,
        config.roles,
        config.align_slices,
        log=log,
        feature_columns=spec,
    )
    _check_roles(summary, config)
    quarantined = sum(summary.quarantined.values())
    for reason, count in sorted(summary.quarantined.items()):
        progress.note(f"{count:,} rows set aside: {reason} (see {run.uri('sessions', ingest.QUARANTINE_FILE)})")
    return Outcome({"sessions": summary.kept, "quarantined": quarantined}, summary.to_dict() | stamp)


def log_changed(run: Run) -> str | None:
    """That a log which others write is not any more what the run has read, as a sentence; the run needs it no more."""
    read = run.manifest("sessions").figures.get("log")
    if read is None:
        return None
    try:
        now = _stamp(run.config)
    except (DataError, OSError):
        return f"{run.config.log.uri} cannot be read any more; the run goes on with what it has read"
    if read == now:
        return None
    return f"{run.config.log.uri} has changed since it was read; another run_dir reads it as it is now"


def _stamp(config: Config) -> str:
    log = config.log
    assert log.uri is not None and log.intents is not None
    tables = [log.intents, *([log.candidate_sets] if log.candidate_sets else [])]
    return storage.stamp([*source.session_uris(log.uri, log), *tables])


def templates(config: Config) -> dict[str, Template]:
    """The prompt templates of a run, by the settings that name them."""
    named = {"prompt.template": config.prompt.template}
    named |= {f"teachers.{each.name}.template": each.template for each in config.teachers if each.template}
    return {key: Template.load(name) for key, name in named.items()}


def check_files(config: Config) -> None:
    """Raises `ConfigError` for a file that the settings name, features or a prompt, and that cannot be read."""
    FeatureSpec.load(config.features.spec)
    templates(config)


def check_templates(run: Run) -> None:
    """Raises `ConfigError` for a template that reads a column that the sessions do not have.

    Not asked by ingest, since a comparison of rankers without an LLM reads no prompt.
    """
    place = run.uri("sessions")
    for key, template in templates(run.config).items():
        template.check([*examples.column_names(place), "region"], place, key)


def _check_roles(summary: ingest.Summary, config: Config) -> None:
    """Raises `DataError` for a role that every run reads and no session has, before hours of work find it out."""
    for role in ("rank", "valid", "test"):
        if not summary.roles[role]:
            raise DataError(
                f"role {role}: none of the log's {summary.kept:,} sessions has it; raise roles.{role} (now "
                f"{getattr(config.roles, role):g}), change roles.test_days (now {config.roles.test_days}) or read more."
            )


def fit_features(run: Run, out: str) -> Outcome:
    spec = FeatureSpec.load(run.config.features.spec)
    sessions = stream.sessions(run.uri("sessions"), columns=spec.columns, roles=["rank"])
    space = FeatureSpace.fit(spec, stream.batches(sessions), run.config.log.history_length)
    storage.write_json(storage.join(out, "features.json"), space.to_dict())
    return Outcome(rows={"fields": space.num_fields}, figures={"version": space.version})


def last_day(config: Config) -> np.datetime64:
    """Last day of the simulated log, which ingest will find as well."""
    from rgalign_ray.world.parameters import FIRST_DAY

    return FIRST_DAY + np.timedelta64(config.world.days - 1, "D")
