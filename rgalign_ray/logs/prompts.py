"""Sessions and intents as text for the reasoner, from a template that can see nothing it must not.

A prompt never holds a click, a label, anything later than the entry, or an id. The template is given
`ts`, `region`, `history` and feature columns; every other column a log is known to have is refused by
name when the template is loaded, and never reaches the template whatever the table holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
import pyarrow as pa
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, model_validator

from rgalign_ray import schema, storage
from rgalign_ray.config.base import read_yaml
from rgalign_ray.errors import ConfigError, DataError, first_line
from rgalign_ray.logs import lists
from rgalign_ray.logs.feature_spec import HIDDEN, parse

KEPT = "prompt.json"

_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


class Template(BaseModel):
    """The texts of one prompt; prefix + session text + suffix is what the reasoner reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    prefix: str
    """Instruction and examples, shared by all sessions; ends right before the session text."""
    session: str
    """Jinja text over one session; `history` is a list of {event, text, ts}, newest first."""
    suffix: str
    """Follows the session text; ends where the latent query starts."""
    item: str
    """Jinja text over one row of the `intents` table."""

    @classmethod
    def load(cls, name_or_path: str) -> Template:
        """A template of the package (configs/prompts) by name, or of a YAML file by path.

        Raises:
            ConfigError: for an unknown name, an unreadable file, a fault of the template, or a column
                that a prompt must not see.
        """
        where = f"prompt.template: {name_or_path}"
        return parse(cls, read_yaml(name_or_path, "prompts", where), where)

    @classmethod
    def of_run(cls, embeddings_uri: str) -> Template:
        """The template that sessions were read with, whatever has become of the file that it came from.

        Args:
            embeddings_uri: an artefact of embeddings.

        Raises:
            DataError: where there is none.
        """
        place = storage.join(embeddings_uri, KEPT)
        if not storage.exists(place):
            raise DataError(f"{place} is not there; `rgalign loop` makes it.")
        return cls.model_validate(storage.read_json(place))

    def keep(self, embeddings_uri: str) -> None:
        """Writes the template beside what was read with it."""
        storage.write_json(storage.join(embeddings_uri, KEPT), self.model_dump())

    @model_validator(mode="after")
    def _sees_nothing_hidden(self) -> Template:
        hidden = HIDDEN & _variables(self.session, "session")
        if hidden:
            raise ValueError(f"session reads '{sorted(hidden)[0]}', which a prompt must not see")
        foreign = _variables(self.item, "item") - set(schema.INTENTS.names)
        if foreign:
            raise ValueError(f"item reads '{sorted(foreign)[0]}'; an intent has {', '.join(schema.INTENTS.names)}")
        return self

    @property
    def key(self) -> str:
        """Hash of the content, for manifests."""
        return storage.content_key(self.model_dump())

    @cached_property
    def columns(self) -> list[str]:
        """The columns that `sessions` reads."""
        return sorted(_variables(self.session, "session") | {"history", "ts"})

    def check(self, found: Collection[str], where: str, key: str = "prompt.template") -> None:
        """Compares the columns that the session text reads with those that there are.

        Args:
            found: names of the sessions' columns.
            where: the sessions, as the error names them.
            key: the setting that named the template.

        Raises:
            ConfigError: for the first column that is missing, with those that a prompt may read.
        """
        for name in self.columns:
            if name not in found:
                there = ", ".join(sorted(set(found) - HIDDEN))
                raise ConfigError(
                    f"{key}: the session text reads '{name}', no column of the sessions in {where}; a prompt may read "
                    f"{there}."
                )

    def sessions(self, table: pa.Table) -> list[str]:
        """The session texts of a table, one per row.

        Only `columns` reach the template, and of the history only what does not lie after `ts`. Text of
        users is made harmless by `neutral`.

        Args:
            table: sessions; `session_id`, where it has one, names the session in errors alone.

        Raises:
            DataError: when a column that the template reads is missing, or the template fails on a session.
        """
        for name in self.columns:
            if name not in table.column_names:
                raise DataError(f"prompt.template: the session text reads '{name}', no column of the sessions.")
        counts, events = lists.past_events(table)
        past = iter(events.to_pylist())
        rows = table.select([name for name in self.columns if name != "history"]).to_pylist()
        text = _ENVIRONMENT.from_string(self.session)
        texts: list[str] = []
        for row, count in zip(rows, counts, strict=True):
            oldest_first = [next(past) for _ in range(count)]
            try:
                texts.append(text.render(neutral({**row, "history": oldest_first[::-1]})).strip())
            except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
                number = len(texts)
                named = "session_id" in table.column_names
                session = f"session '{table['session_id'][number].as_py()}'" if named else f"row {number}"
                raise DataError(
                    f"prompt.template: the session text of template {self.version} fails on {session} "
                    f"({first_line(error).rstrip('.')}); let it expect nulls and an empty history."
                ) from None
        return texts

    def items(self, intents: pa.Table) -> list[str]:
        """The texts of a table of intents, one per row."""
        text = _ENVIRONMENT.from_string(self.item)
        rows = intents.select([name for name in schema.INTENTS.names if name in intents.column_names]).to_pylist()
        return [text.render(neutral(row)).strip() for row in rows]


def _variables(source: str, name: str) -> set[str]:
    try:
        return jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) - set(_ENVIRONMENT.globals)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{name} is not a valid Jinja template ({error})") from None


_SQUARE_TOKEN = re.compile(r"\[(/?[A-Z_]+)\]")


def neutral(value: Any) -> Any:
    """The value with all its texts on one line and without anything a tokenizer takes for a control token.

    Control tokens are matched letter by letter, so one blank breaks them: `<|im_start|>` becomes
    `< |im_start|>`, `</s>` becomes `< /s>`, `[INST]` becomes `[ INST ]`. A line break would end the
    completion or forge the next turn.
    """
    if isinstance(value, str):
        if not value.isprintable():
            value = "".join(c if c.isprintable() else " " for c in value)
        if "<" in value or "[" in value:
            value = _SQUARE_TOKEN.sub(r"[ \1 ]", value.replace("<", "< "))
        return " ".join(value.split())
    if isinstance(value, list):
        return [neutral(entry) for entry in value]
    if isinstance(value, dict):
        return {name: neutral(entry) for name, entry in value.items()}
    return value
