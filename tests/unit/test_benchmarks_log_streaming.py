from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from logs_data import run, session, table, write

from benchmarks.log_streaming import Watch, _link, _scan
from rgalign_ray.config import Roles


def test_a_smaller_log_is_the_first_files_of_the_larger(tmp_path: Path) -> None:
    for day in (1, 2, 3):
        folder = tmp_path / "log" / "sessions" / f"dt=2026-01-0{day}" / "region=SG"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"session_id": [f"{day}-{i}" for i in range(10)]}), folder / "part-00000.parquet")
    for name in ("intents.parquet", "candidate_sets.parquet"):
        pq.write_table(pa.table({"id": ["a"]}), tmp_path / "log" / name)
    part = Path(_link(tmp_path / "log", tmp_path / "part", 15))
    days = sorted(file.parent.parent.name for file in part.rglob("part-*.parquet"))
    assert days == ["dt=2026-01-01", "dt=2026-01-02"]
    assert (part / "intents.parquet").is_file()


def test_the_scan_reads_the_roles_it_is_asked_for_with_their_region(tmp_path: Path) -> None:
    write(tmp_path, table(*(session(i) for i in range(40))))
    run(tmp_path, roles=Roles(test_days=0))
    tables = list(_scan(str(tmp_path / "out"), ["session_id", "region", "role"], ("rank", "valid")))
    rows = pa.concat_tables(tables).to_pydict()
    assert set(rows["role"]) == {"rank", "valid"} and set(rows["region"]) == {"SG"}
    assert len(rows["session_id"]) == len(set(rows["session_id"])) < 40


def test_the_first_batch_starts_the_clock_and_does_not_count() -> None:
    watch = Watch()
    tables = [pa.table({"a": range(n)}) for n in (0, 7, 5, 3)]
    assert [part.num_rows for part in watch.passes(tables)] == [7, 5, 3]
    assert watch.rows == 8
    assert watch.last[0] >= watch.first[0]
