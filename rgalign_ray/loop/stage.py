"""What a stage is: a function of the configuration and of artefacts, that writes one artefact.

A stage gets a `Run` and the folder to write into, and returns what it counted and measured. Everything
it reads is in `inputs` and everything that decides its result in `settings`: the controller makes its
key of both, and skips a stage whose key is already there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.errors import DataError

RECORDS = ".train"
"""Folder of a run for what Ray Train writes while a stage trains."""
KEY_LETTERS = 8
"""Of a stage's key, enough to tell two apart."""


@dataclass(frozen=True)
class Run:
    """One run directory and its configuration."""

    config: Config
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Artefacts that another run has made for this one as well: their places by name."""
    reading_seed: int | None = None
    """Seed by which that run sampled queries as it read sessions, so that reasoners are read alike; None: the own."""
    stage_key: str = "-"
    """Of the stage in work."""

    def uri(self, name: str, *parts: str) -> str:
        """Place of the artefact `name`."""
        return storage.join(self.elsewhere.get(name) or storage.join(self.config.run_uri, name), *parts)

    @property
    def records(self) -> str:
        """Where Ray Train keeps its records: another try of the very stage finds them there, and no other stage does,
        since Ray Train takes up whatever it finds under an equal name.
        """
        return self.uri(RECORDS, self.stage_key)

    @property
    def truth(self) -> str | None:
        """The simulated shop's log with its truth, for evaluation alone; None for other logs."""
        return self.uri("log") if truth_inputs(self.config) else None

    def manifest(self, name: str) -> storage.Manifest:
        """What is written of the artefact `name`.

        Raises:
            DataError: where there is none: its folder was deleted, or copied without it.
        """
        manifest = storage.read_manifest(self.uri(name))
        if manifest is None:
            raise DataError(f"{self.uri(name, storage.MANIFEST)}: not there; copy it, or finish that run.")
        return manifest


def truth_inputs(config: Config) -> tuple[str, ...]:
    """The artefact that `Run.truth` reads, as inputs of a stage that reads it."""
    return ("log",) if config.log.source == "shop" else ()


@dataclass(frozen=True)
class Outcome:
    """What a stage reports into its manifest; equal inputs give equal outcomes."""

    rows: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage and all that its result depends on."""

    name: str
    does: str
    """A few words for the user."""
    run: Callable[[Run, str], Outcome]
    settings: tuple[str, ...]
    """Sections, or single keys as in compare.encoder, of the configuration."""
    inputs: tuple[str, ...]
    """Names of the artefacts it reads."""
    ray: bool = False
    """Whether it needs a cluster."""
    changed: Callable[[Run], str | None] | None = None
    """What has changed since of what it read outside of the run, as a sentence. It is told and redoes nothing: logs
    grow while runs are at work.
    """
    units: bool = False
    """Whether it writes work units that a killed try leaves for the next; else every try starts empty."""
