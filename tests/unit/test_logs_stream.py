"""Which files a stream asks Ray Data for, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from rgalign_ray import storage
from rgalign_ray.logs import stream
from rgalign_ray.logs.partitions import PartitionWriter

REGIONS = ["M Y", "A/B", "100%", "SG"]


@pytest.mark.parametrize("place", ["{}", "file://{}/", "file://{}?x=1/2"])
@pytest.mark.parametrize("region", [None, *REGIONS])
def test_the_files_of_a_region_are_read_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, region: str | None
) -> None:
    uri = place.format(tmp_path / "log")
    writer = PartitionWriter(storage.join(uri, "sessions"))
    entry = pa.scalar(0, pa.timestamp("us"))
    writer.write(pa.table({"region": REGIONS, "ts": pa.array([entry] * len(REGIONS)), "session_id": REGIONS}))
    writer.close()
    read: list[str] = []

    def read_parquet(paths: list[str], *, filesystem: object, **others: object) -> SimpleNamespace:
        for path in paths:
            with filesystem.open_input_file(path) as file:
                read.extend(pq.read_table(file)["session_id"].to_pylist())
        return SimpleNamespace(select_columns=lambda columns: None)

    monkeypatch.setattr(ray.data, "read_parquet", read_parquet)
    stream.sessions(uri, columns=["session_id"], regions=None if region is None else [region])
    assert sorted(read) == (sorted(REGIONS) if region is None else [region])


@pytest.mark.parametrize(("block_bytes", "expected"), [(2**20, stream.LEAST_BLOCKS), (1, 40)])
def test_small_files_share_a_block_and_large_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, expected: int
) -> None:
    for day in range(40):
        folder = tmp_path / f"sessions/dt=2026-01-{day:02d}/region=MY"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"session_id": [str(day)]}), folder / "part-00000.parquet")
    asked: dict[str, object] = {}

    def read_parquet(paths: list[str], **others: object) -> SimpleNamespace:
        asked.update(others, files=len(paths))
        return SimpleNamespace(select_columns=lambda columns: None)

    monkeypatch.setattr(ray.data, "read_parquet", read_parquet)
    stream.sessions(str(tmp_path), columns=["session_id"], block_bytes=block_bytes)
    assert (asked["files"], asked["override_num_blocks"]) == (40, expected)
