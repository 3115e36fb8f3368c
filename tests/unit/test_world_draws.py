from __future__ import annotations

import numpy as np

from rgalign_ray.world.draws import Draws, pick, pick_rows


def test_a_draw_belongs_to_its_id_alone():
    ids = np.arange(1000, dtype=np.uint64)
    whole = Draws(1).uniform("x", ids, 3)
    assert np.array_equal(Draws(1).uniform("x", ids[::-1], 3)[::-1], whole)
    assert np.array_equal(Draws(1).uniform("x", ids[400:500], 2), whole[400:500, :2])
    assert not np.any(Draws(2).uniform("x", ids, 3) == whole)
    assert not np.any(Draws(1).uniform("y", ids, 3) == whole)


def test_draws_are_uniform_and_uncorrelated():
    u = Draws(0).uniform("x", np.arange(50_000, dtype=np.uint64), 4)
    assert u.min() > 0.0 and u.max() < 1.0
    share = np.histogram(u, bins=20, range=(0, 1))[0] / u.size
    assert np.abs(share - 0.05).max() < 0.002
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.02


def test_normal_has_mean_zero_and_variance_one():
    z = Draws(0).normal("z", np.arange(50_000, dtype=np.uint64), 2)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1.0) < 0.02


def test_picks_follow_their_weights():
    u = Draws(0).uniform("pick", np.arange(40_000, dtype=np.uint64), 1)
    weights = np.array([0.5, 0.0, 0.3, 0.2])
    for found in (pick(u[:, 0], weights), pick_rows(u, np.tile(7.0 * weights, (len(u), 1)))[:, 0]):
        assert np.abs(np.bincount(found, minlength=4) / len(u) - weights).max() < 0.01
