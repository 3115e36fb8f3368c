"""A round's sessions, in parts of bounded size: memory does not grow with the slice that is judged.

log ──▶ sessions with a click ──▶ sessions/000000.parquet … (at most PART_SESSIONS each, sorted by id)
                                        │ texts by a template; those of like length together
                                        ▼
                                  work units, named after their part ──▶ rollouts/000000-….parquet, scored/…
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs import examples, lists, stream
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.stage import Run
from rgalign_ray.reward.functions import RESOLVED
from rgalign_ray.rollout.worker import Unit

FOLDER = "sessions"
PART_SESSIONS = 1024


def write(run: Run, out: str, round_: int, templates: Sequence[Template]) -> tuple[int, int]:
    """Writes the sessions of role align_r with a click under `out`; returns how many, and how many have none: no
    click, no reward.

    With `crossfit` they are those of role rank. With 1, which is there to show a leak, they are no more than role
    align_r has, where it has any: what more sessions are worth is another question.

    Their columns are those that prompts, rankers and rewards read, and their users.

    Raises:
        DataError: when none has a click.
    """
    uri = run.uri("sessions")
    role = "rank" if run.config.crossfit else f"align_{round_}"
    space = FeatureSpace.from_dict(storage.read_json(run.uri("features", "features.json")))
    there = examples.column_names(uri)
    optional = [name for name in (RESOLVED,) if name in there]
    read = [name for template in templates for name in template.columns]
    columns = list(dict.fromkeys(["user_id", *read, *examples.columns(space, there), *optional]))
    chosen = _as_many_as_fresh(run, round_) if run.config.crossfit == 1 else None
    storage.delete(storage.join(out, FOLDER))
    written = without_click = 0
    waiting: pa.Table | None = None
    for batch in stream.batches(stream.sessions(uri, columns=columns, roles=[role])):
        clicked = lists.any_true(batch["clicks"])
        without_click += int((~clicked).sum())
        if chosen is not None:
            clicked &= np.isin(batch["session_id"].to_pylist(), chosen)
        kept = batch.filter(pa.array(clicked))
        waiting = kept if waiting is None else pa.concat_tables([waiting, kept])
        while waiting.num_rows >= PART_SESSIONS:
            written += _write_part(out, waiting.slice(0, PART_SESSIONS), written)
            waiting = waiting.slice(PART_SESSIONS).combine_chunks()
    if waiting is not None and waiting.num_rows:
        written += _write_part(out, waiting, written)
    if not written:
        raise DataError(f"role {role}: no session with a click; raise roles.{role[:5]} or the number of sessions.")
    return written, without_click


def _as_many_as_fresh(run: Run, round_: int) -> np.ndarray | None:
    """Ids of the sessions of role rank with a click that come first by hash, as many as role align_r has."""
    like = run.manifest("sessions").figures["roles"].get(f"align_{round_}", 0)
    if not like:
        return None
    read = stream.sessions(run.uri("sessions"), columns=["session_id", "clicks"], roles=["rank"])
    found = [(batch["session_id"].to_pylist(), lists.any_true(batch["clicks"])) for batch in stream.batches(read)]
    ids = np.array([one for part, _ in found for one in part])
    clicked = np.concatenate([part for _, part in found])
    ids = ids[clicked]
    order = np.argsort(session_keys(ids.tolist()))
    return ids[order[: round(like * np.mean(clicked))]]


def _write_part(out: str, sessions: pa.Table, first: int) -> int:
    name = f"{first // PART_SESSIONS:06d}.parquet"
    storage.write_table(storage.join(out, FOLDER, name), sessions.sort_by("session_id"))
    return sessions.num_rows


def parts(folder: str) -> Iterator[tuple[str, pa.Table]]:
    """Name and sessions, sorted by id, of each part of the round whose rollouts are in `folder`."""
    for file in storage.list_files(storage.join(folder, FOLDER), ".parquet"):
        yield storage.pure_path(file).stem, storage.read_table(file)


def users(folder: str, unit: str) -> dict[str, str]:
    """The user of each session of the part that a unit of `folder` is of, by the unit's name."""
    file = storage.join(folder, FOLDER, f"{unit.partition('-')[0]}.parquet")
    table = storage.read_table(file, columns=["session_id", "user_id"])
    return dict(zip(table["session_id"].to_pylist(), table["user_id"].to_pylist(), strict=True))


def drop(folder: str, session_ids: Sequence[str]) -> None:
    """Takes sessions out of their parts."""
    gone = pa.array(list(session_ids), pa.string())
    for name, sessions in parts(folder) if session_ids else ():
        kept = sessions.filter(pa.array(~np.isin(sessions["session_id"].to_pylist(), gone.to_pylist())))
        if kept.num_rows < sessions.num_rows:
            storage.write_table(storage.join(folder, FOLDER, f"{name}.parquet"), kept)


def units(folder: str, template: Template, size: int) -> Iterator[Unit]:
    """Work units of the parts in `folder`, one part after the other."""
    for name, sessions in parts(folder):
        for unit in cut(sessions["session_id"].to_pylist(), template.sessions(sessions), size):
            yield replace(unit, part=name)


def cut(session_ids: list[str], texts: list[str], size: int) -> list[Unit]:
    """Work units of sessions whose texts are of like length, so that little of a batch is padding."""
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), session_ids[row]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [Unit([session_ids[row] for row in chunk], [texts[row] for row in chunk]) for chunk in chunks]


def by_part(folder: str) -> dict[str, list[str]]:
    """Files of units in `folder`, by the part that their names begin with."""
    found: dict[str, list[str]] = {}
    for file in storage.list_files(folder, ".parquet"):
        found.setdefault(storage.pure_path(file).name.partition("-")[0], []).append(file)
    return found


def sampled_units(folder: str) -> Iterator[tuple[pa.Table, str, str]]:
    """The work units that were sampled in `folder`: their sessions in order of id, the file of their queries, and that
    of e(x,q).
    """
    files = by_part(storage.join(folder, "rollouts"))
    for name, sessions in parts(folder):
        place = {session: row for row, session in enumerate(sessions["session_id"].to_pylist())}
        for file in files.get(name, []):
            ids = sorted(set(storage.read_table(file, columns=["session_id"])["session_id"].to_pylist()))
            rows = sessions.take(pa.array([place[session] for session in ids]))
            yield rows, file, storage.join(folder, "embeddings", storage.pure_path(file).name)
