"""The benchmark of prompts that share their beginning, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import shared_prefix
from rgalign_ray import storage


def test_both_ways_are_timed_and_their_tokens_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"session_id": f"s{i}", "prompt_ids": [5] * 30 + [6 + i] * 10, "completion_ids": [7] * 2 if i % 2 else None}
        for i in range(4)
    ]
    storage.write_table(str(tmp_path / "positives/0.parquet"), pa.Table.from_pylist(rows))
    shared_prefix.measure(str(tmp_path / "positives"), model="tiny", micro_batch=[4], repetitions=1, threads=1)
    told = capsys.readouterr().out
    assert "tiny, 4 sessions" in told
    together, apart = 30 + 4 * 10 + 2 * 2, 4 * 42
    assert f"{together / apart:.2f}" in told
