"""Sessions as a Ray Data stream: only the files, row groups and columns that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray.data
from ray.data.datasource.partitioning import Partitioning
from ray.data.expressions import col

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs.partitions import wanted

BATCH_ROWS = 4096
BLOCK_BYTES = 2**20
"""Of Parquet files that are read as one block, where files are smaller."""
LEAST_BLOCKS = 8
"""Of a log that is smaller than that, so that the workers of one machine still share it."""


def sessions(
    uri: str,
    *,
    columns: list[str],
    roles: list[str] | None = None,
    start: str | None = None,
    end: str | None = None,
    regions: list[str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> ray.data.Dataset:
    """The sessions of a prepared log, in the order of files and rows.

    Args:
        uri: the log; its sessions lie in `<uri>/sessions/dt=…/region=…/`.
        columns: what is read; dt and region come from the folders' names.
        roles: as ingest wrote them; None reads all.
        start, end: first and last day, YYYY-MM-DD; None has no bound.
        regions: None reads all.
        block_bytes: of files that are read as one block, at least, where files are smaller; with 1 each is a block, for
            what works at a block for minutes.

    Raises:
        DataError: when the log has no sessions, or none of these days and regions.
    """
    folder = storage.join(uri, "sessions")
    fs, root = storage.filesystem(folder)
    found = storage.list_infos(fs, root, ".parquet")
    infos = [info for info in found if wanted(info.path[len(root) :], start, end, regions)]
    files = [info.path for info in infos]
    if not files:
        days = f"days {start or 'first'} to {end or 'last'}"
        raise DataError(f"{folder}: holds no Parquet file of {days}, regions {regions or 'all'}.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # the other reader starts actors to read footers, which takes longer than a small log; both push filters down
    context.use_datasource_v2 = False
    hive = Partitioning("hive", base_dir=root, field_types={"dt": str, "region": str})
    # Left to itself Ray cuts a log into two hundred blocks at least, and each costs tens of milliseconds; so does a
    # block a file, where days and regions make many small ones.
    blocks = min(len(files), max(LEAST_BLOCKS, sum(info.size for info in infos) // block_bytes))
    dataset = ray.data.read_parquet(files, filesystem=fs, partitioning=hive, override_num_blocks=blocks)
    if roles is not None:
        dataset = dataset.filter(expr=col("role").is_in(roles))
    return dataset.select_columns(columns)


def batches(dataset: ray.data.Dataset, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The dataset as Arrow tables of at most `rows` rows, in order; one batch is in memory at a time."""
    yield from dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=1)
