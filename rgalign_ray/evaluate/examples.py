"""The test sessions that a run shows in full, and how they looked before and after alignment."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from rgalign_ray import config, storage
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import column_names
from rgalign_ray.world.oracle import Oracle


def example_sessions(log_uri: str, truth_uri: str | None, settings: config.Evaluate) -> list[str]:
    """Ids of `settings.examples` clicked test sessions, in an order drawn by hash.

    A session whose true need is `settings.first_example` stands first, one that clicked it before others; where
    the truth is not known, one that clicked it.

    Args:
        truth_uri: the simulated shop's log, whose truth is known; None for other logs.
    """
    folder = storage.join(log_uri, "sessions")
    columns = [name for name in ("candidates", "candidate_set") if name in column_names(log_uri)]
    table = storage.read_table(folder, ["session_id", "clicks", *columns], filters=pc.field("role") == "test")
    catalogue = Catalogue.load(log_uri)
    candidates = catalogue.candidates(table)
    clicks = catalogue.padded(table["clicks"], candidates)
    ids = table["session_id"].to_pylist()
    first = catalogue.index.get(settings.first_example or "", -2)
    on_first = (clicks & (candidates == first)).any(axis=1)
    clicked = np.flatnonzero(clicks.any(axis=1))
    keys = session_keys(ids)
    order = sorted(clicked.tolist(), key=lambda row: keys[row])
    needed = on_first
    if truth_uri is not None:
        needed = np.array(Oracle.load(truth_uri).needs(ids)) == settings.first_example
    leading = sorted(np.flatnonzero(needed).tolist(), key=lambda row: (not on_first[row], keys[row]))[:1]
    return [ids[row] for row in [*leading, *(row for row in order if row not in leading)][: settings.examples]]
