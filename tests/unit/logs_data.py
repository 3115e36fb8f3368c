"""A tiny sound log: three parcels intents, and sessions of a person who waits for one."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import schema
from rgalign_ray.config import Log, Roles
from rgalign_ray.logs import ingest
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FieldSpec

ENTRY = datetime(2026, 1, 10, 12)
SPEC = FeatureSpec(
    fields=(
        FieldSpec(name="status", kind="categorical"),
        FieldSpec(name="days_late", kind="numeric"),
        FieldSpec(name="tags", kind="multi", length=2),
    ),
    min_count=1,
)
SCHEMA = pa.schema(
    [
        *schema.SESSIONS,
        ("candidates", pa.list_(pa.string())),
        ("status", pa.string()),
        ("days_late", pa.float64()),
        ("tags", pa.list_(pa.string())),
    ]
)
INTENTS = pa.Table.from_pylist(
    [
        {"intent_id": "speed_up", "title": "Speed up parcel delivery", "description": "d", "category": "delivery"},
        {"intent_id": "cancel", "title": "Cancel an order", "description": "d", "category": "order"},
        {"intent_id": "refund", "title": "Ask for a refund", "description": "d", "category": "refund"},
    ],
    schema=schema.INTENTS,
)


def event(name: str, hours_before: float) -> dict[str, Any]:
    return {"event": name, "text": f"{name} text", "ts": ENTRY - timedelta(hours=hours_before)}


def session(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "session_id": f"s{number}",
        "user_id": f"u{number}",
        "ts": ENTRY,
        "region": "SG",
        "history": [event("order", 48), event("track", 2)],
        "candidates": ["speed_up", "cancel", "refund"],
        "shown": [True, True, False],
        "clicks": [True, False, False],
        "status": "to_receive",
        "days_late": 7.0,
        "tags": ["late", "hub"],
        **changes,
    }


def table(*sessions: dict[str, Any], columns: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(list(sessions), schema=pa.schema([field.with_nullable(True) for field in columns]))


def write(folder: Path, *files: pa.Table, intents: pa.Table = INTENTS) -> Path:
    """A source of flat Parquet files, beside its knowledge base."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        pq.write_table(rows, source / f"{number}.parquet")
    pq.write_table(intents, folder / "intents.parquet")
    return source


def run(folder: Path, *, roles: Roles | None = None, log: Log | None = None, **changes: Any) -> ingest.Summary:
    """Ingests what `write` wrote into `folder`/out."""
    return ingest.ingest(
        str(folder / "source"),
        str(folder / "intents.parquet"),
        changes.pop("candidate_sets", None),
        str(folder / "out"),
        roles or Roles(test_days=0),
        rounds=1,
        log=log or Log(),
        **{"feature_columns": SPEC, **changes},
    )
