"""Trials are run for models that have something to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import compare, tune


def test_rows_without_anything_to_tune_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "prepare", lambda *_: pytest.fail("nothing may run"))
    chosen = config.validate({"run_dir": str(tmp_path), "compare": {"rows": ["popularity", "cosine"]}})
    with pytest.raises(ConfigError, match=r"^compare\.rows: none has settings to tune"):
        tune.run(chosen)
