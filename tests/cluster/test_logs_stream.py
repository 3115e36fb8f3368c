from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private.internal_api import memory_summary
from ray.exceptions import RayError

from rgalign_ray.errors import DataError
from rgalign_ray.logs import stream

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

DAYS, REGIONS, ROLES = ("2026-01-01", "2026-01-02", "2026-01-03"), ("MY", "SG"), ["rank", "align_1", "rank", "test"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log")
    for day in DAYS:
        for region in REGIONS:
            folder = root / "sessions" / f"dt={day}" / f"region={region}"
            folder.mkdir(parents=True)
            ids = [f"{day}/{region}/{i}" for i in range(4)]
            rows = {"session_id": ids, "role": ROLES, "x": [0.0, 1.0, 2.0, 3.0], "unread": ["y"] * 4}
            pq.write_table(pa.table(rows), folder / "part-00000.parquet")
    return root


def ids(dataset) -> list[str]:
    return [name for batch in stream.batches(dataset, rows=3) for name in batch["session_id"].to_pylist()]


def plan(dataset) -> str:
    """The optimised logical plan that `explain` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        dataset.explain()
    return printed.getvalue().split("Logical Plan (Optimized)")[1].split("Physical Plan")[0]


def test_filter_and_projection_are_folded_into_the_read(log: Path) -> None:
    dataset = stream.sessions(
        str(log), columns=["session_id", "x"], roles=["rank"], start=DAYS[1], end=DAYS[1], regions=["SG"]
    )
    optimised = plan(dataset)
    assert "Read" in optimised
    assert "Filter" not in optimised
    assert "Project" not in optimised
    assert dataset.schema().names == ["session_id", "x"]
    assert ids(dataset) == [f"{DAYS[1]}/SG/0", f"{DAYS[1]}/SG/2"]
    with_a_map = dataset.map_batches(lambda batch: batch, batch_format="pyarrow")
    assert "Filter" not in plan(with_a_map)
    assert "Project" not in plan(with_a_map)


def test_pages_of_other_days_and_regions_are_not_even_read(log: Path, tmp_path: Path) -> None:
    shutil.copytree(log / "sessions", tmp_path / "sessions")
    wanted = f"dt={DAYS[1]}/region=SG"
    for file in (tmp_path / "sessions").rglob("*.parquet"):
        if wanted not in file.as_posix():
            spoil_pages(file)
    with pytest.raises(RayError):
        ids(stream.sessions(str(tmp_path), columns=["session_id"]))
    dataset = stream.sessions(str(tmp_path), columns=["session_id"], start=DAYS[1], end=DAYS[1], regions=["SG"])
    assert len(ids(dataset)) == 4


def spoil_pages(file: Path) -> None:
    """Overwrites everything but the footer, so that the schema can be read and no row can."""
    data = file.read_bytes()
    footer = 8 + int.from_bytes(data[-8:-4], "little")
    file.write_bytes(data[:4] + b"\xff" * (len(data) - 4 - footer) + data[-footer:])


def test_rows_come_in_the_order_of_files_and_with_day_and_region(log: Path) -> None:
    dataset = stream.sessions(str(log), columns=["session_id", "dt", "region"], roles=["rank", "test"])
    rows = [row for batch in stream.batches(dataset, rows=5) for row in batch.to_pylist()]
    expected = [(d, r, i) for d in DAYS for r in REGIONS for i in (0, 2, 3)]
    assert [(row["dt"], row["region"], row["session_id"]) for row in rows] == [
        (d, r, f"{d}/{r}/{i}") for d, r, i in expected
    ]


def large_log(place: Path, files: int) -> list[tuple[str, int]]:
    """Writes a log of 20 MB a file, and returns its sessions and how long their texts are."""
    folder = place / "sessions/dt=2026-01-01/region=MY"
    folder.mkdir(parents=True)
    rows, text = 500, "x" * 40_000
    for number in range(files):
        names = [f"{number:02d}/{row:03d}" for row in range(rows)]
        table = pa.table({"session_id": names, "text": [text] * rows})
        pq.write_table(table, folder / f"part-{number:05d}.parquet")  # small on disk, since it repeats itself
    return [(f"{number:02d}/{row:03d}", len(text)) for number in range(files) for row in range(rows)]


def came(place: Path) -> list[tuple[str, int]]:
    dataset = stream.sessions(str(place), columns=["session_id", "text"])
    return [
        (name, len(text))
        for batch in stream.batches(dataset, rows=100)
        for name, text in zip(batch["session_id"].to_pylist(), batch["text"].to_pylist(), strict=True)
    ]


def test_a_log_larger_than_the_object_store_comes_whole_and_in_order(tmp_path: Path) -> None:
    written = large_log(tmp_path, files=16)
    assert sum(size for _, size in written) > ray.cluster_resources()["object_store_memory"]
    assert came(tmp_path) == written


def test_a_log_comes_whole_where_others_fill_the_object_store(tmp_path: Path) -> None:
    written = large_log(tmp_path, files=4)
    room = int(ray.cluster_resources()["object_store_memory"])
    before = spilled_objects()
    held = [ray.put(np.full(room // 8, number, np.uint8)) for number in range(10)]
    assert came(tmp_path) == written
    assert spilled_objects() > before, "what did not fit lies on disk"
    for number, one in enumerate(held):
        assert (ray.get(one, timeout=60) == number).all()


def spilled_objects() -> int:
    """How many objects Ray has put on disk, since it started."""
    told = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    found = re.search(r"Spilled \d+ MiB, (\d+) objects", told)
    return int(found[1]) if found else 0


def test_a_log_without_sessions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Parquet file"):
        stream.sessions(str(tmp_path), columns=["session_id"])
