"""Sessions as a Ray Data stream: only the files, row groups and columns that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data.datasource.partitioning import Partitioning
from ray.data.expressions import Expr, col, lit

from rgalign_ray import storage
from rgalign_ray.errors import DataError

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
        DataError: when the log has no sessions.
    """
    folder = storage.join(uri, "sessions")
    if not storage.list_files(folder, ".parquet"):
        raise DataError(f"{folder}: holds no Parquet file.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False  # it starts actors to read footers, which take longer than a small log
    hive = Partitioning("hive", field_types={"dt": str, "region": str})
    dataset = ray.data.read_parquet(folder, partitioning=hive)
    for condition in _conditions(roles, start, end, regions):
        dataset = dataset.filter(expr=condition)
    return dataset.select_columns(columns)


def batches(dataset: ray.data.Dataset, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The dataset as Arrow tables of at most `rows` rows, in order; one batch is in memory at a time."""
    yield from dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=1)


def _conditions(
    roles: list[str] | None, start: str | None, end: str | None, regions: list[str] | None
) -> Iterator[Expr]:
    if start is not None:
        yield col("dt") >= lit(start)
    if end is not None:
        yield col("dt") <= lit(end)
    if regions is not None:
        yield col("region").is_in(regions)
    if roles is not None:
        yield col("role").is_in(roles)


def column_names(uri: str) -> list[str]:
    """Columns of the sessions' files; dt and region, which stand in the folders' names, are not among them."""
    file = storage.list_files(storage.join(uri, "sessions"), ".parquet")[0]
    fs, path = storage.filesystem(file)
    return pq.read_schema(path, filesystem=fs).names
