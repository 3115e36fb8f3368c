from __future__ import annotations

import zipfile

import numpy as np
import pytest

from benchmarks import open_bandit
from benchmarks.open_bandit import POSITIONS, Log
from rgalign_ray.errors import UserError
from rgalign_ray.logs.sources import wheels

ITEMS = 6
ATTRACTION = np.array([0.05, 0.3, 0.1, 0.2, 0.15, 0.4])


def log(policies: np.ndarray, rows: int, seed: int) -> Log:
    """Impressions of a policy that changes over time: [periods, items], in equal parts."""
    random = np.random.default_rng(seed)
    period = random.integers(len(policies), size=rows)
    item = np.array([random.choice(ITEMS, p=policies[one]) for one in period])
    click = (random.random(rows) < ATTRACTION[item]).astype(float)
    return Log(item, random.integers(POSITIONS, size=rows), click, policies[period, item])


UNIFORM = np.full((1, ITEMS), 1 / ITEMS)
CHANGING = np.array([[0.9, 0.02, 0.02, 0.02, 0.02, 0.02], [0.02, 0.02, 0.02, 0.02, 0.02, 0.9]])


def test_either_policy_is_estimated_from_the_log_of_the_other() -> None:
    uniform, changing = log(UNIFORM, 4000, 0), log(CHANGING, 4000, 1)
    truth = {"uniform": ATTRACTION.mean(), "changing": (CHANGING @ ATTRACTION).mean()}
    for it in open_bandit.estimates(changing, np.full((ITEMS, POSITIONS), 1 / ITEMS)):
        assert it.bootstrap[0] < truth["uniform"] < it.bootstrap[1], it.estimator
    for name, value, low, high in open_bandit.from_shares(uniform, changing, ITEMS):
        assert low < truth["changing"] < high and low < value < high, name


def test_means_of_logged_propensities_are_no_probabilities() -> None:
    changing = log(CHANGING, 4000, 2)
    assert np.all(open_bandit.mean_of_logged(changing, ITEMS).sum(axis=0) > 1.5)


def test_it_reads_the_wheel_and_says_what_is_missing(tmp_path, monkeypatch) -> None:
    csv = "".join([",".join(["", *open_bandit.COLUMNS]) + "\n", "0,3,1,1,0.25\n", "1,0,3,0,0.5\n"])
    wheel = tmp_path / "obp-0.4.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("obp/dataset/obd/bts/men/men.csv", csv)
        archive.writestr("obp/policy/conf/prior_bts.yaml", "men: {alpha: [100, 1, 1], beta: [1, 100, 100]}")
    assert open_bandit.fetch(tmp_path) == wheel
    found = open_bandit.read(wheel, "bts", "men")
    assert found.item.tolist() == [3, 0] and found.position.tolist() == [0, 2] and found.click.tolist() == [1.0, 0.0]
    prior = open_bandit.prior_policy(wheel, "men")
    assert prior[0, 0] > 0.999 and prior.sum(axis=0) == pytest.approx(np.ones(3))
    failed = type("Done", (), {"returncode": 1, "stderr": "no network\n"})()
    monkeypatch.setattr(wheels.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="no network"):
        open_bandit.fetch(tmp_path / "empty")
