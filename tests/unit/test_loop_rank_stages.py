"""What a run says of its rankers."""

from __future__ import annotations

from typing import Any

import pytest

from rgalign_ray.loop import rank_stages

LITTLE = {"gauc": 0.0002, "standard_error": 0.0009}
MUCH = {"gauc": 0.0100, "standard_error": 0.0009}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (
            {"best_epoch": 0},
            "QE-Rec of round 1 is that of round 0: validation prefers no epoch that it learned on.",
        ),
        (
            {"best_epoch": 0, "over_start": LITTLE},
            "QE-Rec of round 1 is that of round 0: validation prefers what was learned on by +0.0002 GAUC ± 0.0009 "
            "(standard error), not by more than 2 of them.",
        ),
        (
            {"best_epoch": 3, "over_start": MUCH},
            "QE-Rec of round 1 learned on: validation prefers it to that of round 0, +0.0100 GAUC ± 0.0009 "
            "(standard error).",
        ),
    ],
)
def test_what_became_of_a_warm_start_is_told(figures: dict[str, Any], told: str) -> None:
    assert rank_stages.warm_sentence(1, figures, 2.0) == told
