from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import n_sampling


def test_ratios_are_of_medians_and_of_the_same_length() -> None:
    times = {(100, "generate"): [8.0, 9.0, 30.0], (100, "ours"): [3.0, 2.0, 4.0], (512, "generate"): [60.0]}
    found = [{"length": length, "contender": name, "wall_s": wall} for (length, name), wall in times.items()]
    assert n_sampling.ratios(found, "wall_s") == {(100, "generate"): 1.0, (100, "ours"): 3.0, (512, "generate"): 1.0}


def test_every_contender_here_writes_as_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("generate", "float32"):
        n_sampling.one(name, "float32", "tiny", *map(str, (40, 2, 3, 5, 2, 1)))
        made = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert made["tokens"] == 2 * 3 * 5 and len(made["wall_s"]) == len(made["cpu_s"]) == 2
