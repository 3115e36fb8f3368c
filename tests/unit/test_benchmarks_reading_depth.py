"""The benchmark of where to read a session."""

from __future__ import annotations

import numpy as np

from benchmarks.reading_depth import nearest


def test_a_need_is_found_whatever_all_sessions_or_all_intents_share() -> None:
    draw = np.random.default_rng(0)
    need, meaning, shared = draw.integers(12, size=300), draw.normal(size=(12, 16)), 20 * draw.normal(size=(2, 16))
    sessions = meaning[need] + 0.3 * draw.normal(size=(300, 16)) + shared[0]
    assert nearest(sessions, meaning + shared[1], need).mean() > 0.95
    assert abs(nearest(draw.normal(size=(300, 16)), meaning, need).mean() - 3 / 12) < 0.1, "three of twelve by chance"
