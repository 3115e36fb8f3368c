"""Rows over seeds: what is averaged, what is paired, what may be claimed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rgalign_ray import config
from rgalign_ray.evaluate.comparison import Verdict, difference, estimate, estimate_in, share_of_gap

SETTINGS = config.Evaluate(bootstrap=400)


def verdict(values: np.ndarray, seed: int | None, weights: np.ndarray | None = None) -> Verdict:
    """Two sessions a user; a seed draws sessions and users of its own, None is one log for all."""
    log = "" if seed is None else f"{seed}-"
    ids = [f"{log}s{i}" for i in range(len(values))]
    users = [f"{log}u{i // 2}" for i in range(len(values))]
    regions = ["SG" if i % 4 < 2 else "TW" for i in range(len(values))]
    return Verdict(ids, users, regions, {"GAUC": values}, {} if weights is None else {"GAUC": weights})


def test_a_verdict_survives_its_file(tmp_path: Path) -> None:
    values = np.array([0.5, np.nan, 1.0])
    saved = verdict(values, 1, weights=np.array([3.0, 1.0, 2.0]))
    saved.save(str(tmp_path / "verdict.parquet"))
    back = Verdict.load(str(tmp_path / "verdict.parquet"))
    assert (back.sessions, back.users, back.regions) == (saved.sessions, saved.users, saved.regions)
    assert back.values.keys() == back.weights.keys() == {"GAUC"}
    np.testing.assert_array_equal(back.values["GAUC"], values)
    np.testing.assert_array_equal(back.weights["GAUC"], saved.weights["GAUC"])


def test_rankers_of_one_row_are_averaged_session_by_session() -> None:
    weights = np.array([3.0, 1.0, 2.0])
    found = Verdict.mean([verdict(np.array(v), 1, weights) for v in ([0.5, np.nan, 1.0], [0.7, np.nan, 0.0])])
    np.testing.assert_allclose(found.values["GAUC"], [0.6, np.nan, 0.5])
    np.testing.assert_array_equal(found.weights["GAUC"], weights)
    with pytest.raises(AssertionError, match="the same sessions"):
        Verdict.mean([verdict(np.zeros(3), 1), verdict(np.zeros(3), 2)])


@pytest.mark.parametrize("own_log", [True, False])
def test_an_estimate_is_the_mean_over_seeds_of_weighted_means(own_log: bool) -> None:
    draw = np.random.default_rng(0)
    weights = draw.integers(1, 9, 60).astype(float)
    rows = [verdict(draw.random(60), seed if own_log else None, weights) for seed in range(3)]
    found = estimate(rows, "GAUC", SETTINGS)
    means = [float(np.average(row.values["GAUC"], weights=weights)) for row in rows]
    assert found.per_seed == pytest.approx(means)
    assert found.mean == pytest.approx(np.mean(means))
    assert found.users[0] < found.mean < found.users[1]
    assert found.over_seeds is not None and found.over_seeds[0] < found.mean < found.over_seeds[1]


def test_users_of_several_worlds_say_more_than_those_of_one() -> None:
    """The same values as five draws of a world and as one world seen five times."""
    values = np.random.default_rng(0).random(80)
    worlds = estimate([verdict(values, seed) for seed in range(5)], "GAUC", SETTINGS)
    one = estimate([verdict(values, None)] * 5, "GAUC", SETTINGS)
    ratio = (one.users[1] - one.users[0]) / (worlds.users[1] - worlds.users[0])
    assert ratio == pytest.approx(np.sqrt(5), rel=0.2)


def test_a_difference_is_paired_and_claimed_only_over_users_and_seeds() -> None:
    draw = np.random.default_rng(0)
    base = [draw.random(200) for _ in range(4)]
    worse = [verdict(values, seed) for seed, values in enumerate(base)]
    steady = [verdict(values + 0.01, seed) for seed, values in enumerate(base)]
    assert difference(steady, worse, "GAUC", SETTINGS).separated
    moods = [0.05, -0.03, 0.04, -0.02]  # every seed's users agree, the seeds do not
    moody = [verdict(values + moods[seed], seed) for seed, values in enumerate(base)]
    found = difference(moody, worse, "GAUC", SETTINGS)
    assert found.users[0] > 0
    assert not found.separated


def test_a_region_is_judged_by_its_own_sessions() -> None:
    row = [verdict(np.array([0.2, 0.4, 0.8, 0.9] * 5), seed) for seed in range(2)]
    there = estimate_in(row, "GAUC", "SG", SETTINGS)
    assert there is not None and there.mean == pytest.approx(0.3)
    assert estimate_in(row, "GAUC", "BR", SETTINGS) is None
    row[1].values["GAUC"][[0, 1, 4, 5, 8, 9, 12, 13, 16, 17]] = np.nan
    assert estimate_in(row, "GAUC", "SG", SETTINGS) is None, "a seed in which nothing counts"


@pytest.mark.parametrize("own_log", [True, False])
def test_the_share_of_a_gap_is_the_gain_over_what_could_be_gained(own_log: bool) -> None:
    draw = np.random.default_rng(0)
    seeds = [seed if own_log else None for seed in range(3)]
    base = [0.5 + 0.2 * draw.random(60) for _ in seeds]
    worse = [verdict(values, seed) for values, seed in zip(base, seeds, strict=True)]
    ours = [verdict(values + 0.05 + 0.02 * draw.normal(size=60), s) for values, s in zip(base, seeds, strict=True)]
    best = [verdict(values + 0.2, seed) for values, seed in zip(base, seeds, strict=True)]
    found = share_of_gap(ours, worse, best, "GAUC", SETTINGS)
    gain = difference(ours, worse, "GAUC", SETTINGS)
    assert found.mean == pytest.approx(gain.mean / 0.2)
    assert found.users == pytest.approx([bound / 0.2 for bound in gain.users]), "the same users are drawn"
    error = share_of_gap(ours, worse, 1.0, "GAUC", SETTINGS)
    assert error.mean == pytest.approx(gain.mean / (1 - np.mean(base)))
    assert error.users[0] < error.mean < error.users[1]


def test_rows_of_other_sessions_are_not_compared() -> None:
    values = np.random.default_rng(0).random(10)
    with pytest.raises(ValueError, match="same sessions"):
        difference([verdict(values, 0)], [verdict(values, 1)], "GAUC", SETTINGS)
