"""What all settings have in common: their types, names, and the sentence about a fault."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

DATA_CPUS = 1.0
"""Stay free for Ray Data, which does not know of CPUs that actors hold and would wait for ever."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _without_credentials(place: str) -> str:
    if "@" in urlsplit(place).netloc:
        raise ValueError("an address is written into manifests and logs; keys belong in the environment, not in it")
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""A path, or the URI of a filesystem or a server, without keys."""
Count = Annotated[int, Field(ge=1)]


def _distinct(values: list[str]) -> list[str]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{twice[0]} stands twice")
    return values


Distinct = AfterValidator(_distinct)
"""Of a list whose entries are names of artefacts."""


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ASIDE: ClassVar[tuple[str, ...]] = ()
    """Settings that decide no result, but who computes it, where, and how often that may fail: no stage is made anew
    for their sake."""


class Placed(Settings):
    """Workers that may be bound to some of the nodes."""

    node_labels: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]] = {}
    """Labels that a node must carry to hold them, as in {rgalign: rollout}; {}: any node."""

    ASIDE: ClassVar[tuple[str, ...]] = ("node_labels",)


class Trained(Placed):
    """Workers that train together, as one run of Ray Train."""

    workers: Count = 2
    cpus_per_worker: Positive = 0.5
    use_gpu: bool = False
    retries: Annotated[int, Field(ge=0)] = 2
    """How often workers may die; all start again then, from their last checkpoint."""
    deadline_s: Positive = 1800.0
    """Longest time between two optimiser steps, what comes before the first included; then what the workers were at is
    kept, and it counts as a death."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "retries", "deadline_s")


def names_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Full names of all settings of a model, depth first."""
    names = []
    for name, field in model.model_fields.items():
        nested = _settings(field.annotation)
        names += names_of(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return names


def _settings(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is list:  # a list is set as a whole
        return None
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault of a model's settings, as its user should read it."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, names_of(model), n=1, cutoff=0.0)
        return f"{key}: no such setting; the nearest is {near[0]}."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{message}."
    return f"{key}: {message[0].lower()}{message[1:]}, found {first['input']!r}."
