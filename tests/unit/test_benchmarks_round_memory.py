from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import round_memory
from rgalign_ray.loop import round_sessions


def test_what_is_written_is_a_round_that_the_stages_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(round_sessions, "PART_SESSIONS", 8)
    monkeypatch.setattr(round_memory, "UNIT_SESSIONS", 4)
    round_memory.one("write", str(tmp_path), "3")
    round_memory.one("read", str(tmp_path), "3")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["selected"] == 24 and said["peak_mb"] > 0
