from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.weight_swap import one, write
from rgalign_ray import config
from rgalign_ray.reasoner import models

TINY = config.Reasoner(model="tiny", dtype="float32", lora=config.Lora(rank=2, upper_layers=0.5))


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_bytes_are_those_that_a_load_writes(kind: str, tmp_path: Path) -> None:
    found = one(TINY, [write(TINY, tmp_path / f"{number}", number, kind) for number in range(2)], repetitions=3)
    sizes = {name: value.numel() * 4 for name, value in models.load_base(TINY).named_parameters()}
    upper = [size for name, size in sizes.items() if "_proj" in name and "layers.1." in name]
    assert found.megabytes == pytest.approx(sum(upper if kind == "adapter" else sizes.values()) / 1e6)
    assert len(found.load_s) == len(found.copy_s) == 3
