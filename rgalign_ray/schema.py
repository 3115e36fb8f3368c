"""Every Arrow table that crosses a wall of the package, and the check that a table is one.

Ids are strings and a row is never identified by its position. Feature columns of `SESSIONS` are
named by the feature spec, so the schemas below list what every log must have; `check` allows further
columns in `SESSIONS` alone.
"""

from __future__ import annotations

import pyarrow as pa

from rgalign_ray.errors import DataError

TIMESTAMP = pa.timestamp("us")
EVENT = pa.struct([("event", pa.string()), ("text", pa.string()), ("ts", TIMESTAMP)])

INTENTS = pa.schema(
    [
        pa.field("intent_id", pa.string(), nullable=False),
        ("title", pa.string()),
        ("description", pa.string()),
        ("category", pa.string()),
    ]
)

CANDIDATE_SETS = pa.schema(
    [
        pa.field("candidate_set", pa.string(), nullable=False),
        ("intents", pa.list_(pa.string())),
    ]
)
"""Named lists of intents, for logs whose sessions all rank the same ones (`sessions.candidate_set`)."""

SESSIONS = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("ts", TIMESTAMP, nullable=False),
        pa.field("region", pa.string(), nullable=False),
        ("history", pa.list_(EVENT)),
        ("shown", pa.list_(pa.bool_())),
        ("clicks", pa.list_(pa.bool_())),
    ]
)
"""The columns every log has. One of `candidate_set` (string) or `candidates` (list<string>) joins them;
`SESSIONS_OPTIONAL` may. `shown` and `clicks` are parallel to the session's candidates."""

SESSIONS_OPTIONAL = pa.schema(
    [
        ("candidate_set", pa.string()),
        ("candidates", pa.list_(pa.string())),
        ("position", pa.list_(pa.int16())),
        ("propensity", pa.list_(pa.float32())),
        ("resolved", pa.list_(pa.bool_())),
        ("query_text", pa.string()),
    ]
)

ROLE = pa.field("role", pa.string(), nullable=False)
"""Added by ingest: rank, align_1 … align_R, audit, valid, test."""

TRUTH = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("need", pa.string(), nullable=False),
        pa.field("b_user", pa.float64(), nullable=False),
        pa.field("uniform", pa.bool_(), nullable=False),
        pa.field("click_model", pa.string(), nullable=False),
    ]
)
"""What the simulated shop knows of a session: the intent the user needs, her liking to click, whether the slate
was drawn uniformly, and the click model that made the log. For evaluation alone."""

QUARANTINE = pa.schema(
    [
        ("session_id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""A row that was set aside: where it stood in its file, why (a fixed word), and the particulars."""


def embeddings(dim: int) -> pa.Schema:
    """Embeddings of sessions (`readout` prompt or query) or of intents (`readout` item).

    `sample` is the rollout's number, -1 where the vector belongs to no rollout; `query` is the latent
    query that was read after the prompt, null for the other readouts.
    """
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("readout", pa.string(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            ("query", pa.string()),
            pa.field("reasoner_version", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float16(), dim), nullable=False),
        ]
    )


# `fault` says why a rollout must not be judged (null: it may be), found where the sample was at hand
ROLLOUTS = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        ("source", pa.string()),
        ("prompt_version", pa.string()),
        ("temperature", pa.float32()),
        ("query", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish", pa.string()),
        ("fault", pa.string()),
        ("seed", pa.uint64()),
        ("reasoner_version", pa.string()),
    ]
)

PROPOSALS = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        ("query", pa.string()),
        ("finish", pa.string()),
    ]
)
"""What one teacher wrote, in the order of its samples; null where it was asked no more."""

SET_ASIDE = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        ("text", pa.string()),
        ("reason", pa.string()),
    ]
)
"""A session over which workers died, as its prompt has it."""

SCORED = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        ("query", pa.string()),
        ("reward", pa.float32()),
        ("uplift", pa.float32()),
        ("second", pa.float32()),
        ("audit", pa.float32()),
        ("valid", pa.bool_()),
        ("reason", pa.string()),
        ("ranker_version", pa.string()),
    ]
)
"""A judged query: its reward, that above the null query's, and what a second judge and the auditor say, who have no say
in the reward; null where it is not valid, by `reason`."""

SELECTED = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("query", pa.string()),
        ("weight", pa.float32()),
        ("rank", pa.int32()),
    ]
)

PAIRS = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("gap", pa.float32()),
    ]
)
"""Of two queries of a session, the one with the higher reward, and by how much it is higher."""


def check(table_schema: pa.Schema, expected: pa.Schema, where: str, *, extra: bool = False) -> None:
    """Raises `DataError` naming `where` and the first column of `expected` that is missing or of another type.

    Large strings and lists, and timestamps of another unit or zone, count as equal: they cast without loss.
    With `extra=False` a column that `expected` does not have is refused too.
    """
    for field in expected:
        index = table_schema.get_field_index(field.name)
        if index < 0:
            raise DataError(f"{where}: column '{field.name}' is missing; expected {field.type}.")
        if not _same(table_schema.field(index).type, field.type):
            found = table_schema.field(index).type
            raise DataError(f"{where}: column '{field.name}' is {found}; expected {field.type}.")
    if not extra:
        for name in table_schema.names:
            if expected.get_field_index(name) < 0:
                raise DataError(f"{where}: column '{name}' is not part of this table.")


def _same(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if is_list(found) and is_list(expected):
        return _same(found.value_type, expected.value_type)
    if pa.types.is_struct(found) and pa.types.is_struct(expected):
        names = [expected.field(i).name for i in range(expected.num_fields)]
        return all(found.get_field_index(n) >= 0 and _same(found.field(n).type, expected.field(n).type) for n in names)
    if _is_string(found) and _is_string(expected):
        return True
    if pa.types.is_timestamp(found) and pa.types.is_timestamp(expected):
        return True
    if pa.types.is_integer(found) and pa.types.is_integer(expected):
        return True
    if pa.types.is_floating(found) and pa.types.is_floating(expected):
        return True
    return found.equals(expected)


def is_list(kind: pa.DataType) -> bool:
    """Of whatever kind of list."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
