"""FuxiCTR's side of the comparison: its environment, and a log written as the tables that its DIN reads.

Both contenders read the same encoded features: a field's value, a multi-valued field's values and an event are the
same integer in both up to an offset. FuxiCTR's DIN has one table for the items of the history and the candidate; here
it holds intents and events by name, which for MovieLens are the same films.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import progress
from rgalign_ray.errors import UserError
from rgalign_ray.logs import lists
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.features import FIRST, UNKNOWN, FeatureSpace
from rgalign_ray.ranker.rows import Rows, ragged

FUXICTR = "fuxictr==2.3.10"
PARTS = ("train", "valid", "test")


def environment(folder: Path, torch_version: str, torch_index: str | None) -> Path:
    """The interpreter of an environment with FuxiCTR and the torch that is used here; made when it is missing.

    Raises:
        UserError: when pip cannot install it.
    """
    python = folder / "bin" / "python"
    if not _works(python):
        progress.note(f"making {folder} for {FUXICTR}: some minutes, once")
        shutil.rmtree(folder, ignore_errors=True)
        _install([sys.executable, "-m", "venv", str(folder)])
        index = ["--index-url", torch_index] if torch_index else []
        for requirement in ([f"torch=={torch_version}", *index], [FUXICTR]):
            progress.note(f"pip install {requirement[0]}")
            _install([str(python), "-m", "pip", "install", "--quiet", *requirement])
    return python


def _works(python: Path) -> bool:
    if not python.exists():
        return False
    name, _, version = FUXICTR.partition("==")
    code = f"from importlib.metadata import version; assert version('torch') and version('{name}') == '{version}'"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"'{' '.join(command)}' failed ({reason}); name an environment with --peer-env.")


def write(folder: Path, parts: dict[str, Rows], space: FeatureSpace, catalogue: Catalogue) -> None:
    """Writes train, valid, test, user_info, item_info and feature_map under `folder`; one row is a pair of session
    and candidate, one `user` a session with its history."""
    names = sorted({*catalogue.ids, *space.events})
    number = {name: FIRST + place for place, name in enumerate(names)}
    item_of_intent = np.array([number[name] for name in catalogue.ids])
    item_of_event = np.array([0, UNKNOWN, *(number[name] for name in space.events)])
    sizes = _field_sizes(space)
    offsets = np.cumsum([0, *sizes[:-1]])
    histories: list[np.ndarray] = []
    for name in PARTS:
        rows = ragged(parts[name])
        session = lists.rows(rows["candidates"].counts)
        columns: dict[str, Any] = {
            "click": rows["clicks"].values.astype(np.int64),
            "session": session,
            "user_index": session + len(histories),
            "seq_len": (rows["history"] > 0).sum(axis=1)[session],
            "item_index": item_of_intent[rows["candidates"].values],
        }
        for field, offset in enumerate(offsets):
            columns[f"field_{field}"] = (rows["fields"][:, field] - offset).astype(np.int64)[session]
        for field in range(space.num_multi):
            columns[f"multi_{field}"] = _list(rows["multi"][:, field].astype(np.int64)[session])
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        histories += [item_of_event[row[row > 0]] for row in rows["history"]]
    pq.write_table(pa.table({"full_item_seq": pa.array(histories)}), folder / "user_info.parquet")
    items = np.arange(FIRST + len(names))
    pq.write_table(pa.table({"item_index": items, "item_id": items}), folder / "item_info.parquet")
    (folder / "feature_map.json").write_text(json.dumps(_feature_map(folder.name, space, sizes, len(items))))


def _list(values: np.ndarray) -> pa.ListArray:
    """list<int64> of [n, L]."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _field_sizes(space: FeatureSpace) -> list[int]:
    """Ids of each single-valued field, in the order of `FeatureSpace.transform`."""
    known = {**{name: len(edges) + 1 for name, edges in space.edges.items()}}
    known |= {name: len(values) for name, values in space.vocabularies.items()}
    return [FIRST + known[field.name] for field in space.spec.fields if field.kind != "multi"]


def _feature_map(dataset: str, space: FeatureSpace, sizes: list[int], items: int) -> dict[str, Any]:
    features: list[dict[str, Any]] = [
        {name: {"source": "", "type": "meta"}} for name in ("session", "user_index", "seq_len", "item_index")
    ]
    for field, size in enumerate(sizes):
        features.append({f"field_{field}": {"source": "user", "type": "categorical", "vocab_size": size}})
    for field in range(space.num_multi):
        multi = {"vocab_size": space.multi_size, "padding_idx": 0, "max_len": space.multi_length}
        encoder = {"feature_encoder": "layers.MaskedAveragePooling()"}
        features.append({f"multi_{field}": {"source": "user", "type": "sequence", **multi, **encoder}})
    features.append({"item_id": {"source": "item", "type": "categorical", "vocab_size": items, "padding_idx": 0}})
    return {"dataset_id": dataset, "labels": ["click"], "features": features}
