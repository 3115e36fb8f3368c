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


def sessions(
    uri: str,
    *,
    columns: list[str],
    roles: list[str] | None = None,
    start: str | None = None,
    end: str | None = None,
    regions: list[str] | None = None,
) -> ray.data.Dataset:
    """The sessions of a prepared log, in the order of files and rows.

    Args:
        uri: the log; its sessions lie in `<uri>/sessions/dt=…/region=…/`.
        columns: what is read; dt and region come from the folders' names.
        roles: as ingest wrote them; None reads all.
        start, end: first and last day, YYYY-MM-DD; None has no bound.
        regions: None reads all.

    Raises:
        DataError: when the log has no sessions, or none of these days and regions.
    """
    folder = storage.join(uri, "sessions")
    fs, root = storage.filesystem(folder)
    files = [
        file for file in storage.list_paths(fs, root, ".parquet") if wanted(file[len(root) :], start, end, regions)
    ]
    if not files:
        days = f"days {start or 'first'} to {end or 'last'}"
        raise DataError(f"{folder}: holds no Parquet file of {days}, regions {regions or 'all'}.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # the other reader starts actors to read footers, which takes longer than a small log; both push filters down
    context.use_datasource_v2 = False
    hive = Partitioning("hive", base_dir=root, field_types={"dt": str, "region": str})
    # a block a file; left to itself Ray cuts a log into two hundred blocks at least, and each costs milliseconds
    dataset = ray.data.read_parquet(files, filesystem=fs, partitioning=hive, override_num_blocks=len(files))
    if roles is not None:
        dataset = dataset.filter(expr=col("role").is_in(roles))
    return dataset.select_columns(columns)


def batches(dataset: ray.data.Dataset, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The dataset as Arrow tables of at most `rows` rows, in order; one batch is in memory at a time."""
    yield from dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=1)
