"""Sessions by day and region: which files a period asks for, and writing them in bounded memory and under names that do
not depend on chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import storage

BUFFER_BYTES = 256 * 2**20
"""Rows held back to be written in larger files."""

LONGEST = 240
"""Bytes of a region in a folder's name, percent-encoded; filesystems take 255 for the whole name."""
NULL = "__HIVE_DEFAULT_PARTITION__"
"""A folder's name that readers take for null."""

Partition = tuple[str, str]


def fits(region: str) -> bool:
    """Whether a folder may be named after a region."""
    return region != NULL and len(quote(region, safe="")) <= LONGEST


class PartitionWriter:
    """Writes `<uri>/dt=YYYY-MM-DD/region=XX/part-xxxxx.parquet`; each partition keeps the order of its rows.

    The day is that of `ts` (UTC). A partition that fits the buffer becomes one file. Call `close` at the end.
    """

    def __init__(self, uri: str, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.uri = uri
        self.days: Counter[str] = Counter()
        """Rows by day."""
        self._limit = buffer_bytes
        self._buffers: dict[Partition, list[pa.Table]] = {}
        self._bytes: Counter[Partition] = Counter()
        self._parts: Counter[Partition] = Counter()

    def write(self, table: pa.Table) -> None:
        """Adds rows with columns ts and region; region is kept in the folder's name alone."""
        days, regions = day(table["ts"]), np.array(table["region"].to_pylist(), dtype=str)
        for today in np.unique(days):
            for region in np.unique(regions[days == today]):
                inside = np.flatnonzero((days == today) & (regions == region))
                partition = (str(today), str(region))
                part = table.drop_columns("region").take(pa.array(inside))
                self._buffers.setdefault(partition, []).append(part)
                self._bytes[partition] += part.nbytes
                self.days[str(today)] += len(inside)
        if self._bytes.total() > self._limit:
            self._flush(self._limit // 2)

    def close(self) -> None:
        self._flush(0)

    def _flush(self, target: int) -> None:
        """Writes the largest partitions until no more than `target` bytes are held back."""
        for partition, _ in sorted(self._bytes.items(), key=lambda item: (-item[1], item[0])):
            if self._bytes.total() <= target:
                return
            today, region = partition
            name = f"part-{self._parts[partition]:05d}.parquet"
            table = pa.concat_tables(self._buffers.pop(partition))
            folder = storage.join(self.uri, f"dt={today}", f"region={quote(region, safe='')}")
            storage.write_table(storage.join(folder, name), table)
            self._parts[partition] += 1
            del self._bytes[partition]


def folders(path: str) -> dict[str, str]:
    """What the folders of a file's path inside its log are named, as in dt=2026-01-10/region=SG, by key."""
    parts = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    return {key: unquote(value) for key, value in parts}


def wanted(path: str, start: str | None, end: str | None, regions: Collection[str] | None) -> bool:
    """Whether a file's folders leave it possible that its sessions are of the days and regions asked for.

    Args:
        path: of the file inside its log; folders named dt and region decide, where they are there.
        start, end: first and last day, YYYY-MM-DD; None has no bound.
        regions: None asks for all.
    """
    named = folders(path)
    today, region = named.get("dt"), named.get("region")
    if today is None or not re.fullmatch(r"\d{4}-\d\d-\d\d", today):
        in_period = True
    else:
        in_period = (start or today) <= today <= (end or today)
    return in_period and (regions is None or region is None or region in regions)


def day(column: pa.ChunkedArray) -> np.ndarray:
    """datetime64[D] [B], the UTC day of timestamps; the column must hold no null."""
    return pc.cast(column, pa.timestamp("us"), safe=False).to_numpy().astype("datetime64[D]")
