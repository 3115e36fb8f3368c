"""The ladder on a small shop: every kind of row, two seeds, and nothing done twice."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path

import pytest

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.evaluate.report import Report, Row
from rgalign_ray.loop import compare

ALIGNED = ("sft_title", "gradient", "rgalign", "rgalign_shuffled", "rgalign_leak")
READ_OTHERWISE = (
    "qe_rec_query",
    "gradient_query",
    "qe_rec_other",
    "qe_rec_warm",
    "rgalign_warm",
    "rgalign_warm_other",
    "judge",
    "rgalign_not_retrained_query",
    "rgalign_shift",
    "rgalign_centred",
)
WARM = ("row_qe_rec_warm", "aligned_full/row_rgalign_warm")
ALIGNMENTS = ("title", "gradient", "full", "leak")
ROWS = ["popularity", "lr", "din_sentence", "qe_rec", "qe_rec_shuffled"]


def test_a_slice_that_fits_no_node_is_refused(ray_cluster: object) -> None:
    with pytest.raises(ConfigError, match=r"compare\.cpus_per_slice: 64; the cluster's largest node has 2"):
        compare.run_slices(config.validate({"compare": {"cpus_per_slice": 64}}), "ladder", [])


@pytest.mark.slow
def test_rows_over_seeds_make_one_table_and_are_resumed(ray_cluster: object, tmp_path: Path) -> None:
    rows = f"compare.rows=[{','.join(ROWS)}]"
    overrides = ["compare.seeds=2", rows, f"run_dir={tmp_path}", "cluster.num_cpus=2", "ranker.workers=0"]
    settings = config.load("smoke", overrides)
    made = compare.run(settings)
    assert {row.name for row in made.rows} == {compare.ROWS[name].title for name in ROWS}
    assert {(it.better, it.worse) for it in made.comparisons} >= {("QE-Rec", "QE-Rec shuffled")}
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ROWS) * len(made.columns)
    for line in lines:
        low, value, high = (float(line[name]) for name in ("low", "value", "high"))
        assert low <= value + 1e-12 and value <= high + 1e-12, "equal but for rounding where one session counts"
    assert "| QE-Rec |" in (tmp_path / "comparison.md").read_text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed_*/row_*/manifest.json")}
    assert len(files) == 2 * len(ROWS)
    storage.delete(str(tmp_path / "seed_1/row_lr"))
    assert _judged(compare.run(settings)) == _judged(made)
    redone = {path.parent.name for path, at in files.items() if path.stat().st_mtime_ns != at}
    assert redone == {"row_lr"}


@pytest.mark.slow
def test_rows_of_aligned_reasoners_share_what_teaches_them(ray_cluster: object, tmp_path: Path) -> None:
    rows = ["din_more", "qe_rec", "qe_rec_more", "rgalign_not_retrained", *ALIGNED, *READ_OTHERWISE]
    overrides = [
        "compare.seeds=1", f"compare.rows=[{','.join(rows)}]", f"run_dir={tmp_path}", "cluster.num_cpus=2",
        "world.sessions=900", "gradient.batch_sessions=8", "align=[sft]",
        "compare.trainings=2", "encode.test_queries=true", "ranker.workers=0", "learner.workers=0",
    ]  # fmt: skip
    made = compare.run(config.load("smoke", overrides))
    assert {row.name for row in made.rows} == {compare.ROWS[name].title for name in rows}
    pairs = {(it.better, it.worse) for it in made.comparisons}
    assert {("RGAlign-Rec", "QE-Rec"), ("RGAlign-Rec", "ranking gradient"), ("ranking gradient", "QE-Rec")} <= pairs
    seed = tmp_path / "seed_0"
    assert {path.parent.name for path in seed.glob("aligned_*/row_*")} == {f"aligned_{name}" for name in ALIGNMENTS}
    assert {path.name for path in (seed / "aligned_sft").iterdir()} == {"selected_1", "align_1_sft"}
    assert not (seed / "aligned_full/align_1_sft").exists(), "begins with RG-SFT, which stands where its own row has it"
    own = {path.parent.name for path in seed.glob("aligned_*/rollouts_1")}
    assert own == {"aligned_leak"} and (seed / "rollouts_1").is_dir(), "shared, but by what learns from other sessions"
    log = storage.read_table(str(seed / "sessions/sessions"), ["session_id", "role"])
    role = dict(zip(log["session_id"].to_pylist(), log["role"].to_pylist(), strict=True))
    for run, expected in (("", "align_1"), ("aligned_leak", "rank")):
        asked = storage.read_table(str(seed / run / "rollouts_1/sessions"), ["session_id"])
        assert {role[session] for session in asked["session_id"].to_pylist()} == {expected}
    query = storage.read_table(str(seed / "aligned_title/selected_1/selected"))["query"].to_pylist()
    titles = storage.read_table(str(seed / "sessions/intents.parquet"))["title"].to_pylist()
    assert query and set(query) <= set(titles)
    taught = {path.name for path in (seed / "aligned_full").glob("row_*")}
    ways = ("", "_not_retrained", "_not_retrained_query", "_shift", "_centred", "_shuffled", "_warm", "_warm_other")
    read = [f"row_rgalign{how}" for how in ways]
    assert taught == {f"{row}{again}" for row in read for again in ("", "-1")}
    assert not (seed / "aligned_full/row_rgalign_not_retrained/ranker").exists(), "it is the ranker that taught"
    trained = [storage.read_json(str(seed / name / "manifest.json")) for name in ("row_qe_rec", "row_qe_rec-1")]
    assert trained[0]["figures"]["gaucs"] != trained[1]["figures"]["gaucs"], "of different initial weights"
    fresh = storage.read_json(str(seed / "row_qe_rec_more/manifest.json"))["figures"]
    for what in ("sessions", "sessions_with_click", "sessions_with_prompt", "sessions_with_query"):
        assert fresh[what] > trained[0]["figures"][what], "it learns from role align as well"
    judge = storage.read_json(str(seed / "rankers_0/manifest.json"))["figures"]["qe_rec"]
    assert judge["gaucs"] != trained[0]["figures"]["gaucs"], "no row has the initial weights of the ranker that taught"
    warm = [storage.read_json(str(seed / place / "manifest.json"))["figures"] for place in WARM]
    assert warm[0]["losses"] != warm[1]["losses"], "of different reasoners"
    assert all(it["losses"][0] < trained[0]["figures"]["losses"][0] for it in warm), "the judge has learned before"
    assert not list(seed.glob("**/row_*_query*/ranker")), "the rankers are another row's"
    assert not (seed / "row_judge/ranker").exists(), "it teaches"
    own, through_query, other = (
        Verdict.load(str(seed / f"row_{name}/verdict.parquet")).values["GAUC"]
        for name in ("qe_rec", "qe_rec_query", "qe_rec_other")
    )
    assert (own != through_query).any() and (own != other).any() and (through_query != other).any()
    moved = [f"aligned_full/row_rgalign{how}" for how in ("_shift", "_centred", "_not_retrained")]
    values = [Verdict.load(str(seed / f"{row}/verdict.parquet")).values["GAUC"] for row in ("row_judge", *moved)]
    assert all((one != other).any() for one, other in combinations(values, 2))
    assert made.facts["RGAlign-Rec's objectives"] == "sft"
    assert made.reward is not None and made.worth is not None
    (valid,) = [line for line in made.summary if line.startswith("Valid latent queries")]
    assert valid.count("%") == 5, "by the frozen reasoner, and as many alignments"
    assert made.worth.by_reward[0] == made.worth.by_truth[0], "of one query there is no choice"
    diagnosed = [compare.ROWS[name].title for name in (*ALIGNED, "rgalign_warm") if not compare.ROWS[name].shuffled]
    assert [it.name for it in made.diagnoses] == diagnosed, "what reads others' queries has none of its own to lose"
    assert any(it.read for it in made.diagnoses)
    assert {name for it in made.written for name in it.queries} == {
        "frozen reasoner",
        *(compare.ROWS[name].title for name in ("sft_title", "gradient", "rgalign", "rgalign_leak")),
    }


def _judged(made: Report) -> list[Row]:
    """The rows but for the time they took, which is another when a slice is run again."""
    return [row.model_copy(update={"seconds": None}) for row in made.rows]
