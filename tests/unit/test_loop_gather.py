"""Seeds that were run in different places make one table, if they may."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.loop import compare, gather

DOCS = Path(__file__).parents[2] / "docs"
ROWS: list[config.RowName] = ["two_tower", "din"]
SESSIONS = 40
TEXTS = "items_sentence"


def made(place: Path, seed: int, rows: list[config.RowName] = ROWS, **changes: Any) -> None:
    """A seed's folder without weights and vectors, as it travels; DIN is better by .1."""
    settings = compare.of_seed(config.validate(changes | {"run_dir": str(place)}), seed)
    storage.write_json(f"{settings.run_uri}/config.json", settings.model_dump(mode="json"))
    ids = [f"{seed}-{number}" for number in range(SESSIONS)]
    for row in rows:
        values = np.random.default_rng(seed).random(SESSIONS) / 2 + (0.1 if row == "din" else 0)
        verdict = Verdict(ids, ids, ["SG"] * SESSIONS, {"GAUC": values}, {"GAUC": np.full(SESSIONS, 9.0)})
        verdict.save(f"{settings.run_uri}/row_{row}/verdict.parquet")
        figures = {"best_gauc": 0.5, "calibration": {"count": [9], "expected": [0.9], "observed": [0.8]}}
        manifest = storage.Manifest(
            stage=f"row_{row}", key="k", inputs={TEXTS: "t"}, figures=figures, seconds=9.0, peak_memory_mb=500
        )
        storage.write_json(f"{settings.run_uri}/row_{row}/manifest.json", manifest.model_dump())
    texts = storage.Manifest(stage=TEXTS, key="t", seconds=1.0)
    storage.write_json(f"{settings.run_uri}/{TEXTS}/manifest.json", texts.model_dump())


def told(tmp_path: Path, places: list[Path], rows: list[config.RowName] = ROWS) -> Any:
    settings = {"compare": {"rows": rows}, "evaluate": {"bootstrap": 100}, "run_dir": str(tmp_path / "together")}
    return gather.run(config.validate(settings), [str(place) for place in places])


def test_seeds_of_several_places_make_one_table(tmp_path: Path) -> None:
    for place, seed in (("here", 0), ("there", 2), ("there", 1)):
        made(tmp_path / place, seed)
    report = told(tmp_path, [tmp_path / "there", tmp_path / "here"])
    whole = [float(np.mean(np.random.default_rng(seed).random(SESSIONS) / 2)) for seed in range(3)]
    gauc = {row.name: row.metrics["GAUC"].value for row in report.rows}
    assert gauc["AutoInt+MoE two-tower"] == pytest.approx(np.mean(whole))
    assert gauc["DIN"] == pytest.approx(np.mean(whole) + 0.1)
    assert report.facts["seeds"] == "3"
    assert (tmp_path / "together/comparison.html").exists()


def test_an_exploratory_row_is_of_the_seed_that_has_it(tmp_path: Path) -> None:
    made(tmp_path / "here", 1, ["two_tower"])
    made(tmp_path / "there", 2)
    asked = {"rows": ["two_tower"], "exploratory": ["din"]}
    settings = config.validate({"compare": asked, "evaluate": {"bootstrap": 100}, "run_dir": str(tmp_path / "all")})
    report = gather.run(settings, [str(tmp_path / "there"), str(tmp_path / "here")])
    of_first, of_second = (float(np.mean(np.random.default_rng(seed).random(SESSIONS) / 2)) for seed in (1, 2))
    gauc = {row.name: row.metrics["GAUC"].value for row in report.rows}
    assert gauc["DIN (exploratory)"] == pytest.approx(of_second + 0.1)
    assert gauc["AutoInt+MoE two-tower"] == pytest.approx((of_first + of_second) / 2)
    assert report.facts["seeds"] == "2" and report.facts["exploratory rows"] == "of seed 2 alone"
    settings = config.validate({"compare": {"rows": ROWS}, "run_dir": str(tmp_path / "all")})
    with pytest.raises(DataError, match=r"seed_1/row_din: not there"):
        gather.run(settings, [str(tmp_path / "there"), str(tmp_path / "here")])


def test_a_seed_that_is_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    for place, seed in (("here", 0), ("there", 1)):
        made(tmp_path / place, seed)
    old = storage.read_json(f"{tmp_path}/here/seed_0/config.json")
    del old["encode"]["test_queries"]
    storage.write_json(f"{tmp_path}/here/seed_0/config.json", old)
    assert told(tmp_path, [tmp_path / "here", tmp_path / "there"]).facts["seeds"] == "2"


def test_a_seed_of_before_a_default_changed_was_made_otherwise(tmp_path: Path) -> None:
    before = {"reasoner": {"pooling": "last", "depth": 1.0}, "ranker": {"text_match": False}}
    before |= {"evaluate": {"rank_by": "log"}, "reward": {"rank_by": "log"}}
    made(tmp_path / "here", 0, **before)
    made(tmp_path / "there", 1)
    with pytest.raises(ConfigError, match="seed_1 was made with another evaluate than"):
        told(tmp_path, [tmp_path / "here", tmp_path / "there"])
    made(tmp_path / "elsewhere", 2)
    old = storage.read_json(f"{tmp_path}/elsewhere/seed_2/config.json")
    for section, settings in before.items():
        for name in settings:
            del old[section][name]
    storage.write_json(f"{tmp_path}/elsewhere/seed_2/config.json", old)
    assert told(tmp_path, [tmp_path / "here", tmp_path / "elsewhere"]).facts["seeds"] == "2"


def test_seeds_may_differ_in_what_decides_no_result(tmp_path: Path) -> None:
    made(tmp_path / "here", 0)
    made(tmp_path / "there", 1, name="mine", encode={"workers": 3, "kept": "/elsewhere"})
    assert told(tmp_path, [tmp_path / "here", tmp_path / "there"]).facts["seeds"] == "2"


def test_settings_of_an_objective_that_no_row_learns_by_may_differ(tmp_path: Path) -> None:
    made(tmp_path / "here", 0)
    made(tmp_path / "there", 1, grpo={"n": 4})
    assert told(tmp_path, [tmp_path / "here", tmp_path / "there"]).facts["seeds"] == "2"
    rows: list[config.RowName] = ["qe_rec", "rg_grpo"]
    found = {str(tmp_path / "here"): [0], str(tmp_path / "there"): [1]}
    aligned = tmp_path / "here/seed_0/aligned_grpo/row_rg_grpo/manifest.json"
    storage.write_json(str(aligned), storage.Manifest(stage="row_rg_grpo", key="k").model_dump())
    gather.agree(found, rows)
    there = tmp_path / "there/seed_1/aligned_grpo/row_rg_grpo/manifest.json"
    storage.write_json(str(there), storage.Manifest(stage="row_rg_grpo", key="k").model_dump())
    with pytest.raises(ConfigError, match=r"seed_1 was made with another grpo than .*seed_0"):
        gather.agree(found, rows)


def test_what_is_told_of_seeds_is_how_they_were_made(tmp_path: Path) -> None:
    made(tmp_path / "here", 0, reasoner={"model": "tiny"})
    report = told(tmp_path, [tmp_path / "here"])
    assert report.facts["reasoner"] == report.config["reasoner"]["model"] == "tiny"
    assert report.config["evaluate"]["bootstrap"] == 100 and report.config["run_dir"] == str(tmp_path / "together")


def test_seeds_may_differ_in_what_is_asked_of_them(tmp_path: Path) -> None:
    made(tmp_path / "here", 0, compare={"seeds": 1, "rows": ROWS})
    made(tmp_path / "there", 1, compare={"seeds": 1, "first_seed": 1}, evaluate={"bootstrap": 300})
    assert told(tmp_path, [tmp_path / "here", tmp_path / "there"]).facts["seeds"] == "2"


def test_how_seeds_were_judged_is_not_for_the_one_who_asks(tmp_path: Path) -> None:
    made(tmp_path / "here", 0, evaluate={"k": 5}, compare={"max_text_tokens": 64})
    report = told(tmp_path, [tmp_path / "here"])
    assert report.config["evaluate"]["k"] == 5 and report.config["compare"]["max_text_tokens"] == 64
    assert report.config["compare"]["rows"] == ROWS


def test_a_seed_of_which_nothing_says_how_it_was_made_is_named(tmp_path: Path) -> None:
    made(tmp_path / "here", 0)
    (tmp_path / "here/seed_0/config.json").unlink()
    with pytest.raises(DataError, match=r"seed_0/config\.json: not there; run `rgalign compare` for that seed again"):
        told(tmp_path, [tmp_path / "here"])


def test_a_seed_is_told_of_once(tmp_path: Path) -> None:
    for place in ("here", "there"):
        made(tmp_path / place, 0)
    with pytest.raises(ConfigError, match=r"--from: seed 0 stands in two of the places"):
        told(tmp_path, [tmp_path / "here", tmp_path / "there"])


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"ranker": {"dim": 64}}, "ranker"),
        ({"world": {"sessions": 9000}}, "world"),
        ({"align": ["sft"]}, "align"),
        ({"compare": {"tuned": {"din": {"dim": 32}}}}, "compare"),
        ({"evaluate": {"k": 5}}, "evaluate"),
    ],
)
def test_seeds_of_other_settings_make_no_table(tmp_path: Path, changes: dict[str, Any], differing: str) -> None:
    made(tmp_path / "here", 0)
    made(tmp_path / "there", 1, **changes)
    with pytest.raises(ConfigError, match=f"seed_1 was made with another {differing} than"):
        told(tmp_path, [tmp_path / "here", tmp_path / "there"])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    made(tmp_path / "here", 0, ["two_tower"])
    with pytest.raises(
        DataError, match=r"row_din: not there; finish that seed, or name compare\.rows and compare\.trainings that all"
    ):
        told(tmp_path, [tmp_path / "here"])
    assert told(tmp_path, [tmp_path / "here"], ["two_tower"]).facts["seeds"] == "1"
    (tmp_path / "here/seed_0/row_two_tower/verdict.parquet").unlink()
    with pytest.raises(DataError, match=r"row_two_tower: not there"):
        told(tmp_path, [tmp_path / "here"], ["two_tower"])
    with pytest.raises(ConfigError, match=r"nowhere: no folder seed_0 or the like"):
        told(tmp_path, [tmp_path / "nowhere"])


def test_a_row_that_was_made_of_something_else_is_not_told_of(tmp_path: Path) -> None:
    made(tmp_path / "here", 0)
    texts = tmp_path / f"here/seed_0/{TEXTS}/manifest.json"
    storage.write_json(str(texts), storage.Manifest(stage=TEXTS, key="others").model_dump())
    with pytest.raises(DataError, match=rf"row_two_tower: made of another {TEXTS} than .*; finish that seed"):
        told(tmp_path, [tmp_path / "here"])
    texts.unlink()
    with pytest.raises(DataError, match=rf"{TEXTS}/manifest\.json: not there; copy it, or finish that run"):
        told(tmp_path, [tmp_path / "here"])


def test_what_the_documents_tell_of_kept_seeds_can_be_told() -> None:
    pages = ("alignment-study.md", "earlier-studies.md")
    text = "\n".join((DOCS / page).read_text() for page in pages).replace("\\\n", "")
    commands = [shlex.split(line) for line in re.findall(r"^rgalign compare .*--from docs/.*", text, re.MULTILINE)]
    assert len(commands) == 4
    for command in commands:
        after = dict(pairwise(command))
        sets = [value for word, value in pairwise(command) if word == "--set"]
        settings = config.load(after["--config"], sets)
        rows = gather.rows_of(settings)
        place = str(DOCS.parent / after["--from"])
        gather.whole(gather.runs(settings, rows, {place: gather.seeds_of(place)}), rows)
