"""Near-line: e(x) of the users who are likely to come, read by Ray Data into the file that the service looks up.

situations (a log, whose outcomes are not read) ──▶ encoders (actor pool) ──▶ query store, the newest of each user
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import config, progress, ray_stacks
from rgalign_ray.logs import stream
from rgalign_ray.rollout.encode import as_user_errors, by_encoders, room
from rgalign_ray.schema import TIMESTAMP
from rgalign_ray.serve import query_store
from rgalign_ray.serve.pair import FrozenReasoner, PairSpec
from rgalign_ray.serve.query_store import Kept


class Reader:
    """Reads batches of situations; a plain class that Ray Data runs."""

    def __init__(self, spec: PairSpec, encode: config.Encode) -> None:
        self.reasoner, self.reader, self.encode = FrozenReasoner(spec), spec.reader(), encode

    def __call__(self, batch: pa.Table) -> pa.Table:
        with ray_stacks.noted(self.encode.deadline_s, ends=True):
            return self._vectors(batch)

    def _vectors(self, batch: pa.Table) -> pa.Table:
        at = batch.column_names.index("ts")  # of a log that no ingest has read it may have a zone
        batch = batch.set_column(at, "ts", pc.cast(batch["ts"], TIMESTAMP, safe=False))
        texts = self.reader.texts_of(batch)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # of like length, so that little is padding
        vectors: list[bytes] = [b""] * len(texts)
        for start in range(0, len(order), self.encode.batch_size):
            rows = order[start : start + self.encode.batch_size]
            for row, vector in zip(rows, self.reasoner.read([texts[row] for row in rows]), strict=True):
                vectors[row] = vector.tobytes()
        return pa.table({"user_id": batch["user_id"], "ts": batch["ts"], "vector": pa.array(vectors, pa.binary())})


def read_ahead(spec: PairSpec, log_uri: str, start: str | None, folder: str, encode: config.Encode) -> int:
    """Writes the store of a pair's reasoner, and swaps it for the old one.

    Args:
        spec: the pair.
        log_uri: a prepared log, or one that has no more than user_id, ts and what the prompt reads.
        start: first day (YYYY-MM-DD) on which users count as active; None: all.
        folder: `serve.store`.
        encode: how many workers, where, and how many sessions at once.

    Returns:
        Users in the store.

    Raises:
        DataError: where the log has no such days.
        InfrastructureError: as `rollout.encode.encode`.
    """
    columns = sorted({*spec.reader().template.columns, "user_id", "ts"})
    situations = stream.sessions(log_uri, columns=columns, start=start, block_bytes=1)
    total = situations.count()
    read = by_encoders(situations, Reader, encode, spec=spec, encode=encode)

    def kept() -> Iterator[Kept]:
        with progress.track("read ahead", total, "sessions", idle=partial(room, encode)) as advance:
            for block in read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in block.to_pylist():
                    yield Kept(row["user_id"], row["ts"], np.frombuffer(row["vector"], np.float16))
                advance(block.num_rows)

    with as_user_errors("read ahead", encode):
        return query_store.write(folder, spec.reads, kept())
