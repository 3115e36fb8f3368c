"""What bfloat16 leaves of an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_reasoner_models import adapter

from benchmarks.adapter_precision import kept, read
from rgalign_ray.reasoner.engine import Prompts


def test_of_a_large_adapter_all_is_left_either_way(tmp_path: Path) -> None:
    place = adapter(tmp_path / "a", 1, std=0.015, rank=16, alpha=32.0)
    found = read(place, Prompts("tell: ", [f"parcel {i} late" for i in range(64)], " so:"))
    wanted = found["float32, adapter"] - found["float32"]
    for how in ("to the nearest", "at random"):
        assert kept(found[f"bfloat16, adapter {how}"] - found["bfloat16"], wanted) == pytest.approx(1.0, abs=0.15)
    assert np.abs(found["bfloat16"] - found["float32"]).max() > 0, "read in another precision"
    assert kept(0.6 * wanted, wanted) == pytest.approx(0.6)
    assert kept(-wanted, wanted) == pytest.approx(-1.0)
