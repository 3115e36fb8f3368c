from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from rgalign_ray import storage
from rgalign_ray.evaluate import plackett_luce, policy_study, policy_study_report
from rgalign_ray.evaluate.policy_study import SHOP_POLICY, TARGETS, TRUE_CTR, Settings, Shop

SMALL = Settings(seeds=2, sessions=150, population=3, rankers=3, ranker_seeds=2, bootstrap=30, a_a_repetitions=100)


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop.draw(1, SMALL)


def test_the_log_holds_whole_users_and_the_old_rankers_own_marginals(shop: Shop) -> None:
    users = set(shop.users[shop.rows])
    assert not users & set(np.delete(shop.users, shop.rows))
    assert 75 < len(shop.rows) < 300
    log = shop.log
    assert log.marginal is not None
    assert log.marginal[:, 0] == pytest.approx(log.propensity[:, 0], rel=1e-5)
    assert np.abs(log.marginal[:, 2] - log.propensity[:, 2]).max() > 0.05


def test_the_truth_is_the_click_models_expectation_under_common_random_numbers(shop: Shop) -> None:
    sharp, even = shop.logits(1000.0 * shop.relevance), shop.logits(0.0 * shop.old)
    found = shop.truth({"sharp": sharp, "even": even, "shifted": shop.logits(0.0 * shop.old + 3.0)}, 2, seed=0)
    assert np.array_equal(found["even"]["clicks"], found["shifted"]["clicks"])
    first = plackett_luce.best(sharp, 1)
    alone = shop.oracle.expected(shop.ids, first)[0]
    assert np.all(found["sharp"]["any click"] >= alone)
    assert np.all(found["even"]["any click"] <= found["even"]["clicks"] + 1e-12)
    assert found["sharp"]["clicks"].mean() > found["even"]["clicks"].mean() + 0.2


def test_a_seed_estimates_every_target_and_compares_rankers() -> None:
    found = policy_study.study_seed(SMALL, 3, with_rankers=True)
    assert {row["target"] for row in found["estimates"]} == set(TARGETS)
    near = [row for row in found["estimates"] if row["target"] == SHOP_POLICY and row["estimator"] == "prefix IPS"]
    assert len(near) == 2
    assert all(abs(row["value"] - row["truth"]) < 5 * row["standard_error"] for row in near)
    assert len(found["rankers"]) == SMALL.rankers
    assert all(0 < ranker[TRUE_CTR] < 1 for ranker in found["rankers"])
    clicks = {row["estimator"] for row in found["estimates"] if row["reward"] == "clicks"}
    any_click = {row["estimator"] for row in found["estimates"] if row["reward"] == "any click"}
    assert "item-position IPS" in clicks - any_click and "cascade DR" in clicks & any_click


def result(errors: list[float]) -> dict:
    """A study of one target whose estimates miss 0.3 by these errors, with intervals of ± 0.1."""
    row = {"truth": 0.3, "standard_error": 0.05}
    row |= {"effective_sessions": 10.0, "largest_weight": 2.0}
    rankers = [{TRUE_CTR: 0.1 * i, "good": float(i), "bad": float(-i), "flat": 1.0 + (i == 1)} for i in range(4)]
    seeds = []
    for error in errors:
        value = 0.3 + error
        interval = [value - 0.1, value + 0.1]
        estimates = [
            row | {"target": name, "value": value, "normal": interval, "bootstrap": interval} for name in TARGETS
        ]
        rates = {name: {"any click": 0.3 + 0.03 * (name != SHOP_POLICY)} for name in TARGETS}
        both = [
            one | {"reward": reward, "estimator": estimator}
            for one in estimates
            for estimator, reward in policy_study_report.TRUSTED.items()
        ]
        seeds.append({"estimates": both, "values": rates, "rankers": rankers})
    a_a = {"by_session": 0.05, "users_by_session": 0.1, "by_user": 0.05, "repetitions": 1000, "sessions": 9, "users": 3}
    return {"seeds": seeds, "a_a": a_a}


def test_bias_rmse_and_coverage_are_over_seeds() -> None:
    found = policy_study_report.summarise(result([0.05, -0.05, 0.2, 0.0]))
    row = found.estimators[0]
    assert row["bias"] == pytest.approx(0.05)
    assert row["bias_interval"][0] < 0.05 < row["bias_interval"][1]
    assert row["rmse"] == pytest.approx(np.sqrt((0.0025 + 0.0025 + 0.04) / 4))
    assert row["normal_coverage"] == row["bootstrap_coverage"] == 0.75
    few = found.effective[0]
    assert len(TARGETS) * 4 == few["estimates"] and few["to"] == 30.0 and few["coverage"] == 0.75
    assert found.a_b[0]["needed"] > 1000 and found.a_b[0]["difference"] == pytest.approx(0.03)
    by_metric = {row["metric"]: row for row in found.rankers}
    assert by_metric["good"]["correlation"] == pytest.approx(1.0) and by_metric["good"]["lost"] == pytest.approx(0.0)
    assert by_metric["bad"]["correlation"] == pytest.approx(-1.0) and by_metric["bad"]["lost"] == pytest.approx(0.3)
    assert by_metric["flat"]["lost"] == pytest.approx(0.2)


def test_it_writes_a_page_tables_and_a_picture(tmp_path) -> None:
    found = policy_study_report.summarise(result([0.05, -0.05, 0.2, 0.0]))
    policy_study_report.write(found, SMALL, "python -m jobs.policy_study", str(tmp_path))
    page = (tmp_path / "study.md").read_text()
    assert "python -m jobs.policy_study" in page and "| prefix IPS | +0.0500 [" in page and "75% [30%, 95%]" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "study.csv").read_text())))
    assert len(rows) == len(policy_study_report.TRUSTED) * len(TARGETS) and float(rows[0]["bias_low"]) < float(
        rows[0]["bias_high"]
    )
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch) -> None:
    done = result([0.05, -0.05])["seeds"]
    for number, seed in enumerate(done):
        storage.write_json(policy_study._place(SMALL, str(tmp_path), number), seed)
    monkeypatch.setattr(policy_study, "_write_seed", None)  # would fail if anything were missing
    found = policy_study.run(SMALL, str(tmp_path))
    assert found["seeds"] == done and 0 <= found["a_a"]["by_user"] <= 1
    changed = replace(SMALL, sessions=151)
    assert policy_study._place(changed, "x", 0) != policy_study._place(SMALL, "x", 0)
    assert policy_study._place(replace(SMALL, seeds=9), "x", 0) == policy_study._place(SMALL, "x", 0)
