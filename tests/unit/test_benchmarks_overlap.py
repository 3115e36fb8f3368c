from __future__ import annotations

import pytest

from benchmarks.overlap import ideal


def test_the_ideal_pipeline_waits_for_the_longer_of_both() -> None:
    assert ideal(12, 0, sample_s=2.0, learn_s=3.0) == pytest.approx(11 * 5.0 + 3.0)
    assert ideal(12, 1, sample_s=2.0, learn_s=3.0) == pytest.approx(12 * 3.0)
    assert ideal(12, 1, sample_s=4.0, learn_s=3.0) == pytest.approx(11 * 4.0 + 3.0)
