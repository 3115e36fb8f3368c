"""What has to be computed for a unit does not grow unseen."""

from __future__ import annotations

import json

from benchmarks.counts import BASELINE, NEW, TEXTS, TOLERANCE, N, counts


def test_nothing_has_to_be_computed_that_had_not() -> None:
    found, held = counts(), json.loads(BASELINE.read_text())
    assert set(found) == set(held), "python -m benchmarks.counts --write"
    grown = {name: (value, held[name]) for name, value in found.items() if value > TOLERANCE * held[name]}
    assert not grown, "more than a fifth above benchmarks/counts.json; --write takes them over, where it is meant"


def test_the_figures_are_what_the_design_promises() -> None:
    held = json.loads(BASELINE.read_text())
    assert held["first unit: model calls"] == 2 + NEW, "the instruction, the prompts, and a step for each new token"
    assert held["next unit: model calls"] == 1 + NEW, "an instruction is computed once"
    suffix = len("\nQuestion:")
    prompts = len(TEXTS) * (max(map(len, TEXTS)) + suffix)
    assert held["next unit: tokens computed"] == prompts + len(TEXTS) * N * NEW, "a prompt once, whatever N"
    assert held["reward: user tower calls"] == 1
    assert held["reward: sessions through the user tower"] == 4, "once a session, whatever N"
