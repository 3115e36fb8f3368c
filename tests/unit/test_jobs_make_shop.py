from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.make_shop import make
from rgalign_ray import storage
from rgalign_ray.errors import ConfigError

SMALL = ["world={sessions: 300, users: 100, days: 3}", "roles.test_days=1"]


def test_it_writes_the_log_that_the_settings_ask_for_and_says_how_fast(tmp_path: Path, capsys) -> None:
    make(str(tmp_path), override=SMALL)
    out = capsys.readouterr().out
    assert storage.read_table(str(tmp_path / "sessions"), ["session_id"]).num_rows == 300
    assert storage.read_table(str(tmp_path / "truth"), ["session_id"]).num_rows == 300
    assert "300 sessions" in out
    assert re.search(r"[\d,]+ sessions/s, [\d,]+ per second of CPU; [\d,]+ MiB", out)


def test_a_log_that_is_there_is_not_mixed_with_another(tmp_path: Path) -> None:
    make(str(tmp_path), override=SMALL)
    before = storage.list_files(str(tmp_path))
    with pytest.raises(ConfigError, match="holds a log already"):
        make(str(tmp_path), override=SMALL)
    assert storage.list_files(str(tmp_path)) == before
