"""A log of what was served, for the next run: answers with what became of them, in the `sessions` schema.

  answers of all machines ──┐
                            ├─ by request id ─▶ sessions/dt=…/region=…  +  intents.parquet
  feedback of all machines ─┘

An answer that nothing was told of is left out, since nobody knows that it was seen. Memory holds the feedback and one
batch of answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from rgalign_ray import progress, schema, storage
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs import partitions
from rgalign_ray.logs.catalogue import INTENTS_FILE, Catalogue
from rgalign_ray.serve import feedback
from rgalign_ray.serve.feedback import Answer
from rgalign_ray.serve.pair import PairSpec

BATCH = 4096
OUTCOME = [
    *(schema.SESSIONS.field(name) for name in ("session_id", "user_id", "shown", "clicks")),
    *(schema.SESSIONS_OPTIONAL.field(name) for name in ("candidates", "position", "propensity", "resolved")),
    *(pa.field(name, pa.string()) for name in ("served_version", "served_variant", "served_path")),
]
COUNTS = {
    "sessions": "sessions written",
    "clicked": "of them with a click",
    "untold": "answers that nothing was told of, left out",
    "repeated": "answers to a request id that another machine had answered, left out",
    "forgotten": "answers to users who asked to be forgotten, left out",
    "retired": "answers with an intent that the knowledge base no longer has, left out",
    "no_folder": "answers of a region that no folder can be named after, left out",
    "unanswered": "feedback on answers that are not there",
    "not_shown": "clicks and resolutions of intents that were not shown, left out",
}


@dataclass(slots=True)
class Told:
    """All feedback on one answer."""

    seen: int | None = None
    clicks: set[str] = field(default_factory=set)
    resolved: set[str] = field(default_factory=set)

    def add(self, body: dict[str, Any]) -> None:
        if body.get("seen") is not None:
            self.seen = max(self.seen or 0, body["seen"])
        self.clicks.update(body.get("clicks", ()))
        self.resolved.update(body.get("resolved", ()))


def collect(folder: str, specs: Sequence[PairSpec], out_uri: str) -> dict[str, int]:
    """Writes the log of all that is kept in `folder`.

    Args:
        folder: `serve.feedback`, or one with the files of several machines' folders.
        specs: of all that was served since; their sessions tell the columns' types.
        out_uri: folder that is not there yet.

    Returns:
        counts, by the names of `COUNTS`.

    Raises:
        ConfigError: where nothing is kept, or the target is there.
        DataError: where the versions do not have the same intents, or disagree on a column's type.
    """
    files = feedback.files(folder)
    if not files:
        raise ConfigError(f"serve.feedback: {folder} holds no feedback; `rgalign serve` writes it there.")
    if storage.exists(out_uri):
        raise ConfigError(f"--out: {out_uri} is there already; name a folder that is not.")
    columns, catalogue = _columns(specs), Catalogue.load(specs[0].sessions_uri)
    for spec in specs[1:]:
        if Catalogue.load(spec.sessions_uri).ids != catalogue.ids:
            raise DataError(f"{spec.sessions_uri}: other intents than those of {specs[0].sessions_uri}.")
    told: dict[str, Told] = {}
    forgotten: dict[str, datetime] = {}
    for file in files:
        for request_id, body in feedback.feedback(file):
            told.setdefault(request_id, Told()).add(body)
        for user_id, ts in feedback.forgotten(file):
            forgotten[user_id] = max(ts, forgotten.get(user_id, ts))
    counts = Counter(dict.fromkeys(COUNTS, 0))
    with storage.writing(out_uri) as out, progress.track("collect", len(told), "answers") as advance:
        storage.write_table(storage.join(out, INTENTS_FILE), catalogue.intents)
        writer = partitions.PartitionWriter(storage.join(out, "sessions"))
        met: set[str] = set()
        found = _kept(files, told, forgotten, catalogue, counts, met)
        while batch := list(islice(found, BATCH)):
            rows = [_row(answer, told[answer.request_id], catalogue.ids, counts) for answer in batch]
            writer.write(pa.Table.from_pylist(rows, schema=columns))
            advance(len(rows))
        writer.close()
        counts["unanswered"] = len(told.keys() - met)
        key = storage.content_key(sorted(told), dict(counts))
        storage.write_json(
            storage.join(out, storage.MANIFEST),
            storage.Manifest(stage="collect", key=key, rows=dict(counts)).model_dump(),
        )
    return dict(counts)


def _columns(specs: Sequence[PairSpec]) -> pa.Schema:
    try:
        return pa.unify_schemas([pa.schema(OUTCOME), *(spec.reader().schema for spec in specs)])
    except pa.ArrowTypeError as error:
        raise DataError(f"the served versions disagree on a column: {error}") from None


def _kept(
    files: Sequence[Path],
    told: dict[str, Told],
    forgotten: dict[str, datetime],
    catalogue: Catalogue,
    counts: Counter[str],
    met: set[str],
) -> Iterator[Answer]:
    """Answers that become sessions; `met` gets the ids of all answers that something was told of."""
    for file in files:
        for answer in feedback.answers(file):
            repeated = answer.request_id in met
            if answer.request_id in told:
                met.add(answer.request_id)
            if answer.user_id in forgotten and answer.received <= forgotten[answer.user_id]:
                counts["forgotten"] += 1
            elif answer.request_id not in told:
                counts["untold"] += 1
            elif repeated:
                counts["repeated"] += 1
            elif not catalogue.index.keys() >= {*answer.body["slate"], *(answer.body["candidates"] or ())}:
                counts["retired"] += 1
            elif not partitions.fits(answer.body["row"]["region"]):
                counts["no_folder"] += 1
            else:
                yield answer


def _row(answer: Answer, told: Told, intents: list[str], counts: Counter[str]) -> dict[str, Any]:
    body = answer.body
    slate = body["slate"] if told.seen is None else body["slate"][: told.seen]
    places = {intent: place for place, intent in enumerate(slate)}
    candidates = body["candidates"] or intents
    counts["sessions"] += 1
    counts["clicked"] += bool(told.clicks & places.keys())
    counts["not_shown"] += len((told.clicks | told.resolved) - places.keys())
    row = body["row"]
    history = [{**event, "ts": datetime.fromisoformat(event["ts"])} for event in row["history"]]
    shown = [intent in places for intent in candidates]
    return row | {
        "session_id": answer.request_id,
        "user_id": answer.user_id,
        "ts": answer.ts,
        "history": history,
        "candidates": candidates,
        "shown": shown,
        "clicks": [intent in places and intent in told.clicks for intent in candidates],
        "resolved": [intent in places and intent in told.resolved for intent in candidates],
        "position": [places.get(intent, -1) for intent in candidates],
        "propensity": [body["propensity"][places[intent]] if intent in places else 0.0 for intent in candidates],
        "served_version": body["version"],
        "served_variant": body["variant"],
        "served_path": body["path"],
    }
