"""What all settings have in common: their types, names, and the sentence about a fault."""

from __future__ import annotations

import difflib
import math
import os
import textwrap
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rgalign_ray.errors import ConfigError

DATA_CPUS = 1.0
"""Stay free for Ray Data, which does not know of CPUs that actors hold and would wait for ever."""

COLUMNS = 118
"""Of a comment."""
MAX_CHOICES = 12
"""More are told in documents."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _without_credentials(place: str) -> str:
    if "@" in urlsplit(place).netloc:
        raise ValueError("an address is written into manifests and logs; keys belong in the environment, not in it")
    return place


def absolute(place: str) -> str:
    """A place that means the same in every folder: paths of this machine are made absolute, URIs are already."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


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
    """Base of every settings model: unknown keys are errors, values do not change, and what stands under a setting is
    what `rgalign config` says of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    ASIDE: ClassVar[tuple[str, ...]] = ()
    """Settings that decide no result, but who computes it, where, and how often that may fail: no stage is made anew
    for their sake."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A setting that has only another default is for what it was for."""
        for name, field in cls.model_fields.items():
            before = (base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, Settings))
            field.description = field.description or next((it.description for it in before if it), None)


class Placed(Settings):
    """Workers that may be bound to some of the nodes."""

    node_labels: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]] = {}
    """Labels that a node must carry to hold them, as in {rgalign: rollout}; {}: any node."""

    ASIDE: ClassVar[tuple[str, ...]] = ("node_labels",)


class Trained(Placed):
    """Workers that train together, as one run of Ray Train."""

    workers: Annotated[int, Field(ge=0)] = 2
    """Processes. 0: the driver trains, in its own memory; what is small is spared the start of the others, and a driver
    that dies begins the stage anew."""
    cpus_per_worker: Positive = 0.5
    use_gpu: bool = False
    """One for each worker."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often workers may die; all start again then, from their last checkpoint."""
    deadline_s: Positive = 1800.0
    """Longest time between two optimiser steps, what comes before the first included; then what the workers were at is
    kept, and it counts as a death."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "retries", "deadline_s")

    @model_validator(mode="after")
    def _driver(self) -> Trained:
        if self.use_gpu and not self.workers:
            raise ValueError("use_gpu is of workers, and workers is 0: the driver trains on CPUs")
        return self

    @property
    def ranks(self) -> int:
        """Processes that train, the driver among them."""
        return max(self.workers, 1)


def read_yaml(name_or_path: str, folder: str, where: str) -> Any:
    """The content of a path ending in .yaml or .yml, or of a file of the package's configs/`folder` by name.

    Args:
        where: what names it, for the error.

    Raises:
        ConfigError: for an unknown name, a file that is missing, or one that is no YAML.
    """
    packaged = resources.files("rgalign_ray").joinpath("configs", folder)
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{where}: no such file.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read as text in UTF-8 ({error}).") from None
    elif name_or_path in (known := packaged_yaml(folder)):
        text = packaged.joinpath(f"{name_or_path}.yaml").read_text()
    else:
        raise ConfigError(f"{where}: not one of {', '.join(known)}, nor a .yaml file.")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())}).") from None


def packaged_yaml(folder: str) -> list[str]:
    """Names of the files of the package's configs/`folder`."""
    there = resources.files("rgalign_ray").joinpath("configs", folder).iterdir()
    return sorted(each.name.removesuffix(".yaml") for each in there if each.name.endswith(".yaml"))


def commented(settings: Settings, indent: str = "") -> str:
    """Settings as YAML, with what each is for above it; read back, they are the same settings."""
    lines = []
    for name, field in type(settings).model_fields.items():
        value, said = getattr(settings, name), " ".join((field.description or "").split()).replace("None", "null")
        choices = _choices(field.annotation)
        if any(choice not in said for choice in choices):
            said = f"{said} One of {', '.join(choices)}.".lstrip()
        lines += [f"{indent}# {line}" for line in textwrap.wrap(said, COLUMNS - len(indent))]
        if isinstance(value, Settings):
            lines += [f"{indent}{name}:", commented(value, f"{indent}  ")]
        else:
            plain = settings.model_dump(mode="json", include={name})
            style = None if isinstance(value, list | dict) else False  # lists and such of plain values on one line
            text = yaml.safe_dump(plain, default_flow_style=style, sort_keys=False, allow_unicode=True, width=math.inf)
            lines += [f"{indent}{line}" for line in text.splitlines()]
    return "\n".join(lines)


def _choices(annotation: Any) -> list[str]:
    """Of a setting that is one of a few words."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal and len(get_args(kind)) <= MAX_CHOICES:
            return [str(choice) for choice in get_args(kind)]
    return []


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
    named = f"{key}: " if key else ""
    if first["type"] == "value_error":
        return f"{named}{message}."
    if first["type"] == "missing":
        return f"{named}must be set."
    return f"{named}{message[0].lower()}{message[1:]}, found {first['input']!r}."
