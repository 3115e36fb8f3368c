"""Which columns of a log are features, and of what kind: a YAML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rgalign_ray import schema, storage
from rgalign_ray.config.base import read_yaml, sentence
from rgalign_ray.errors import ConfigError, DataError

VISIBLE = ("ts", "region", "history")
"""Columns every log has that features and prompts may read, besides those of its own."""

HIDDEN = frozenset({*schema.SESSIONS.names, *schema.SESSIONS_OPTIONAL.names, schema.ROLE.name, "dt"} - set(VISIBLE))
"""Labels, what came of a session, ids and what ingest adds: neither features nor prompts may read them."""

Kind = Literal["categorical", "numeric", "multi"]
Model = TypeVar("Model", bound=BaseModel)


class FieldSpec(BaseModel):
    """One feature column.

    categorical: a string, whole number or boolean. numeric: a number, cut into quantile buckets.
    multi: a list of strings or whole numbers, of which the first `length` are read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    buckets: Annotated[int, Field(ge=2)] = 16
    length: Annotated[int, Field(ge=1)] = 5


class HistorySpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    length: Annotated[int, Field(ge=1)] = 20
    """Newest events that are read, where the run's configuration does not say."""


class FeatureSpec(BaseModel):
    """The feature columns of a log; `history` is always read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: Annotated[tuple[FieldSpec, ...], Field(min_length=1)]
    history: HistorySpec = HistorySpec()
    min_count: Annotated[int, Field(ge=1)] = 2
    """A value or event seen less often while fitting is unknown: unknown then has training data too."""

    @classmethod
    def load(cls, name_or_path: str) -> FeatureSpec:
        """A spec of the package (configs/features) by name, or of a YAML file by path.

        Raises:
            ConfigError: for an unknown name, an unreadable file, a key that is none, or a column that a feature must
                not see.
        """
        where = f"features.spec: {name_or_path}"
        spec = parse(cls, read_yaml(name_or_path, "features", where), where)
        names = [field.name for field in spec.fields]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: field '{twice}' is listed twice.")
        return spec

    @model_validator(mode="after")
    def _sees_nothing_hidden(self) -> FeatureSpec:
        if hidden := [field.name for field in self.fields if field.name in HIDDEN]:
            raise ValueError(f"field '{hidden[0]}' is a label, an id or made by ingest, which a feature must not see")
        return self

    @property
    def key(self) -> str:
        """Hash of the content, for manifests."""
        return storage.content_key(self.model_dump(mode="json"))

    def of_kind(self, kind: Kind) -> list[FieldSpec]:
        return [field for field in self.fields if field.kind == kind]

    def history_length(self, asked: int | None) -> int:
        """Newest events of a history that are read: as many as a run asks for, else as many as the spec says."""
        return self.history.length if asked is None else asked

    @property
    def columns(self) -> list[str]:
        """The columns of a sessions table that features come from."""
        return [*(field.name for field in self.fields), "history", "ts"]

    def check(self, found: pa.Schema, where: str) -> None:
        """Raises `DataError` naming `where` and the first field whose column is missing or of a type it cannot be."""
        for field in self.fields:
            index = found.get_field_index(field.name)
            if index < 0:
                raise DataError(f"{where}: column '{field.name}' is missing; the feature spec reads it ({field.kind}).")
            kind = found.field(index).type
            if not _fits(field.kind, kind):
                expected = _EXPECTED[field.kind]
                raise DataError(f"{where}: column '{field.name}' is {kind}; a {field.kind} feature is {expected}.")


_EXPECTED = {
    "categorical": "a string, a whole number or a boolean",
    "numeric": "a number or a boolean",
    "multi": "a list of strings or whole numbers",
}


def _fits(kind: Kind, found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if kind == "multi":
        return schema.is_list(found) and _fits("categorical", found.value_type)
    whole = pa.types.is_integer(found) or pa.types.is_boolean(found)
    if kind == "numeric":
        return whole or pa.types.is_floating(found)
    return whole or pa.types.is_string(found) or pa.types.is_large_string(found)


def parse(model: type[Model], data: Any, where: str) -> Model:
    """A model from plain data, or a `ConfigError` with its first fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {sentence(error, model)}") from None
