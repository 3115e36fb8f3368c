from __future__ import annotations

import pytest

from benchmarks.rollout_pool import busy, recovery

SEEN = [
    (1, 10.0, "start"),
    (2, 10.5, "start"),
    (1, 11.0, "begin"),
    (2, 12.0, "begin"),
    (1, 13.0, "end"),
    (1, 13.5, "begin"),
    (1, 15.0, "end"),
    (3, 16.0, "start"),
    (3, 16.5, "begin"),
    (3, 18.5, "end"),
    (3, 18.5, "begin"),
    (3, 20.5, "end"),
]
"""Worker 2 is killed at 14, in its first unit; worker 3 takes its place."""


def test_busy_is_the_share_between_first_and_last_unit() -> None:
    assert busy([note for note in SEEN if note[0] != 2]) == pytest.approx([3.5 / 4.0, 1.0])


def test_a_unit_that_had_begun_before_the_first_note_is_left_out() -> None:
    later = [note for note in SEEN if note[0] == 3 and note[1] > 16.5]
    assert busy(later) == []
    assert busy([*later, (3, 21.0, "begin"), (3, 22.0, "end")]) == pytest.approx([3.0 / 3.5])


def test_recovery_ends_with_the_next_workers_first_unit() -> None:
    assert recovery(SEEN, began=9.0, killed=14.0) == pytest.approx({"start_s": 2.0, "back_after_s": 2.5})
