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


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []

    def apart(words: list[object], threads: int) -> str:
        asked.append(words)
        if len(asked) == 2:
            raise RuntimeError("interrupted")
        return json.dumps({"tokens": 6, "wall_s": [1.0], "cpu_s": [1.0]})

    monkeypatch.setattr(n_sampling.command, "apart", apart)
    with pytest.raises(RuntimeError, match="interrupted"):
        n_sampling.measure(tmp_path, length=[40])
    n_sampling.measure(tmp_path, length=[40])
    assert [words[4] for words in asked] == ["generate", "float32", "float32", "ours"]
    assert len(json.loads((tmp_path / "n_sampling.json").read_text())["measured"]) == 3
