"""The ladder's report: what is said of rows whose quality is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rgalign_ray import config, storage
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.loop import ladder_report
from rgalign_ray.loop.ladder_report import RowResult

SESSIONS = 120
QUALITY: dict[config.RowName, float] = {
    "popularity": 0.5,
    "two_tower": 0.58,
    "din": 0.6,
    "qe_rec": 0.7,
    "qe_rec_shuffled": 0.6,
    "true_need": 0.9,
}


def judged(row: config.RowName, seeds: Sequence[int] = (0, 1)) -> RowResult:
    verdicts, manifests = [], []
    for seed in seeds:
        noise = np.random.default_rng(seed).normal(scale=0.02, size=SESSIONS)
        own = np.random.default_rng([seed, *row.encode()]).normal(scale=0.002, size=SESSIONS)
        values = QUALITY.get(row, 0.65) + noise + own
        verdicts.append(
            Verdict(
                [f"{seed}-{i}" for i in range(SESSIONS)],
                [f"{seed}-{i // 2}" for i in range(SESSIONS)],
                ["SG" if i % 2 else "TW" for i in range(SESSIONS)],
                {"GAUC": values, "true CTR@3": values / 2},
                {"GAUC": np.full(SESSIONS, 20.0)},
            )
        )
        figures = {
            "best_gauc": QUALITY.get(row, 0.65),
            "calibration": {"count": [90, 0, 10], "expected": [1.8, 0.0, 5.0], "observed": [0.9, 0.0, 6.0]},
        }
        manifests.append(
            storage.Manifest(
                stage=f"row_{row}",
                key="k",
                inputs={},
                rows={},
                figures=figures,
                seconds=10.0 + seed,
                peak_memory_mb=500,
            )
        )
    return RowResult(row, list(seeds), verdicts, manifests, 40.0 if row == "qe_rec" else 0.0)


@pytest.fixture(scope="module")
def report() -> ladder_report.report.Report:
    settings = config.validate({"compare": {"rows": list(QUALITY), "seeds": 2}, "evaluate": {"bootstrap": 200}})
    return ladder_report.make(settings, [judged(row) for row in QUALITY])


def test_competitors_stand_above_controls_with_what_they_cost(report: ladder_report.report.Report) -> None:
    assert [row.name for row in report.rows if not row.control] == ["AutoInt+MoE two-tower", "DIN", "QE-Rec"]
    assert [row.control for row in report.rows] == [False] * 3 + [True] * 3
    seconds = {row.name: row.seconds for row in report.rows}
    assert seconds["QE-Rec"] == pytest.approx(50.5), "reading the texts counts"
    assert seconds["DIN"] == pytest.approx(10.5)
    assert report.columns == ["GAUC", "true CTR@3"]


def test_gains_are_told_as_shares_of_error_and_headroom(report: ladder_report.report.Report) -> None:
    said = "\n".join(report.summary)
    assert "QE-Rec over DIN: true CTR@3 +0.05" in said and "GAUC +" not in said, "the truth is known"
    assert "QE-Rec against DIN: +25" in said, "0.1 of an error of 0.4"
    assert "of the headroom to the true need it closes +33" in said, "0.05 of 0.15"
    assert "over users)" in said


def test_a_row_of_one_seed_is_held_against_that_seed_of_others() -> None:
    rows: list[config.RowName] = ["qe_rec", "rg_dpo"]
    settings = config.validate({"compare": {"rows": rows, "seeds": 2}, "evaluate": {"bootstrap": 200}})
    both = judged("qe_rec")
    once = replace(judged("rg_dpo", seeds=[1]), exploratory=True)
    made = ladder_report.make(settings, [both, once])
    (found,) = [it for it in made.comparisons if it.metric == "GAUC"]
    second = once.verdicts[0].values["GAUC"] - both.verdicts[1].values["GAUC"]
    assert found.better == "RG-DPO (exploratory)" and found.difference.value == pytest.approx(second.mean())
    assert made.facts["exploratory rows"] == "of seed 1 alone"
    assert "RG-DPO (exploratory) over QE-Rec" in "\n".join(made.summary)
    assert "separated over users (one seed)" in "\n".join(made.summary)


def test_rows_that_have_no_seed_in_common_are_not_compared() -> None:
    rows: list[config.RowName] = ["gradient", "gradient_shuffled"]
    settings = config.validate({"compare": {"rows": rows, "seeds": 2}, "evaluate": {"bootstrap": 200}})
    made = ladder_report.make(settings, [judged("gradient", seeds=[0]), judged("gradient_shuffled", seeds=[1])])
    assert len(made.rows) == 2 and not made.comparisons


def test_why_is_shown_and_not_said() -> None:
    rows: list[config.RowName] = ["qe_rec", "qe_rec_other", "qe_rec_shuffled"]
    settings = config.validate({"compare": {"rows": rows, "seeds": 2}, "evaluate": {"bootstrap": 200}})
    made = ladder_report.make(settings, [judged(row) for row in rows])
    assert "QE-Rec over QE-Rec shuffled" in "\n".join(made.summary)
    assert "another's query" not in "\n".join(made.summary)
    assert [it for it in made.comparisons if it.worse == "QE-Rec, another's query" and it.metric == "true CTR@3"]


def test_of_warm_starts_the_methods_own_is_said() -> None:
    rows: list[config.RowName] = ["qe_rec", "rg_sft", "rg_sft_warm", "rgalign_warm"]
    settings = config.validate({"compare": {"rows": rows, "seeds": 2}, "evaluate": {"bootstrap": 200}})
    said = "\n".join(ladder_report.make(settings, [judged(row) for row in rows]).summary)
    assert "RGAlign-Rec, warm start over QE-Rec:" in said and "RG-SFT, best of N over QE-Rec:" in said
    assert "RG-SFT, best of N, warm start over" not in said


def test_the_method_as_a_whole_is_held_against_rivals_where_it_starts_warm() -> None:
    def said(*rows: config.RowName) -> str:
        settings = config.validate({"compare": {"rows": rows, "seeds": 2}, "evaluate": {"bootstrap": 200}})
        return "\n".join(ladder_report.make(settings, [judged(row) for row in rows]).summary)

    cold = said("popularity", "din", "qe_rec", "rgalign")
    assert "RGAlign-Rec over DIN:" in cold and "DIN over popularity" not in cold
    warm = said("popularity", "din", "qe_rec", "rgalign", "rgalign_warm")
    assert "RGAlign-Rec over DIN:" not in warm and "RGAlign-Rec, warm start over DIN:" in warm
    assert "RGAlign-Rec over QE-Rec:" in warm


def test_details_are_shown_of_the_rows_that_are_compared(report: ladder_report.report.Report) -> None:
    assert {part.metric for part in report.breakdowns} == {"GAUC", "true CTR@3"}
    for part in report.breakdowns:
        assert part.groups == ["SG", "TW"]
        assert list(part.rows) == ["QE-Rec", "DIN", "AutoInt+MoE two-tower"]
    (line, *_) = report.calibration
    assert line.expected == pytest.approx([0.02, 0.5])
    assert line.observed == pytest.approx([0.01, 0.6])
    assert report.facts["candidates a session"] == "20.0"
    assert report.facts["sessions that count in GAUC"] == "100.0%"


def test_the_best_rival_is_chosen_as_rows_rank() -> None:
    """The two-tower imitates best what an old ranker has shown; of what was shown the DIN knows more."""
    rows = [judged(row) for row in ("two_tower", "din", "qe_rec")]
    for result, shown in zip(rows, (0.5, 0.6, 0.7), strict=True):
        for manifest in result.manifests:
            manifest.figures |= {"gauc_shown": shown, "best_gauc": 1 - shown}
    assert ladder_report.validation(rows, "click") == pytest.approx({"two_tower": 0.5, "din": 0.6})
    by_log = pytest.approx({"two_tower": 0.5, "din": 0.4})
    assert ladder_report.validation(rows, "log") == by_log
    names = [result.row for result in rows]
    assert ladder_report.claims(names, ladder_report.validation(rows, "click"))[0] == ("qe_rec", "din")
    assert ladder_report.claims(names, ladder_report.validation(rows, "log"))[0] == ("qe_rec", "two_tower")
    del rows[0].manifests[0].figures["gauc_shown"]
    assert ladder_report.validation(rows, "click") == by_log, "one of them cannot be judged so"


def test_what_learned_from_fewer_sessions_is_not_held_against_what_learned_from_more() -> None:
    names: list[config.RowName] = ["din", "din_more", "din_sentence", "qe_rec", "rgalign", "true_need"]
    pairs = ladder_report.claims(names, {"din_sentence": 0.5, "din": 0.6, "din_more": 0.7})
    assert ("qe_rec", "din") in pairs and ("true_need", "din") in pairs
    assert not [pair for pair in pairs if pair[1] == "din_more" and pair[0] != "rgalign"]
    held = [worse for better, worse in pairs if better == "rgalign" and ladder_report.ROWS[worse].rival]
    assert held == ["din_more", "din", "din_sentence"], "its headroom is told of the first, which knows as much"
