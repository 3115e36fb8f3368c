from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rgalign_ray import config
from rgalign_ray.config import Config, Settings
from rgalign_ray.config.base import names_of
from rgalign_ray.config.root import _assign
from rgalign_ray.errors import ConfigError

KEYS = names_of(Config)


def refused(name_or_path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(name_or_path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def empty(tmp_path: Path) -> str:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return str(path)


@pytest.mark.parametrize("name", config.available())
def test_every_packaged_configuration_is_valid(name: str) -> None:
    assert isinstance(config.load(name), Config)


def test_the_configurations_that_the_documents_name_exist() -> None:
    splits = {"movielens_by_time", "movielens_new_users", "movielens_cold_films"}
    assert {"smoke", "demo", "ladder", "movielens"} | splits <= set(config.available())


@given(st.sampled_from(KEYS))
def test_a_misspelt_key_is_refused_by_full_name_with_the_nearest_valid_one(key: str) -> None:
    wrong = key + "z"
    data: dict = {}
    _assign(data, wrong, 1)
    with pytest.raises(ConfigError) as caught:
        config.validate(data)
    assert str(caught.value) == f"{wrong}: no such setting; the nearest is {key}."


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("ranker.dim=wide", "ranker.dim"),
        ("ranker.dim=3.5", "ranker.dim"),
        ("rollout.n=1", "rollout.n"),
        ("reward.kind=clicks", "reward.kind"),
        ("cluster.num_cpus=0", "cluster.num_cpus"),
        ("align=[sft, prayer]", "align.1"),
        ("log.start=yesterday", "log.start"),
    ],
)
def test_an_ill_typed_value_is_refused_by_its_keys_full_name(empty: str, override: str, key: str) -> None:
    message = refused(empty, override)
    assert message.startswith(f"{key}: ")
    assert "found" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("roles.rank=0.9", "add up to 1"),
        ("ranker.dim=30", "multiple of ranker.heads"),
        ("encode.query_share=0", "never saw e(x,q)"),
        ("log.source=parquet", "uri and intents"),
        ("roles.cold_share=0.2", "world.cold_share"),
        ("select.n=5", "more than the 4 queries"),
        ("crossfit=3 align=[gradient] roles.align=0 roles.rank=0.75", "does not go with gradient"),
        ("crossfit=3 roles.align=0 roles.rank=0.75", "does not go with gradient"),
        ("crossfit=3 align=[sft]", "set roles.align to 0"),
        ("early_stop=true", "roles.audit is 0"),
        ("rounds=3 roles.slices=2", "cuts align into 2"),
        ("roles.align=0 roles.rank=0.75", "roles.align unless crossfit is"),
        ("log.end=2026-02-01", "the shop is as long as world.days"),
        ("align=[sft,contrastive,sft]", "align: sft stands twice"),
        ("ranker.workers=0 ranker.use_gpu=true", "the driver trains on CPUs"),
        ("learner.workers=0 learner.use_gpu=true", "the driver trains on CPUs"),
        ("learner.workers=0 align=[grpo] grpo.sampler=pool", "set learner.workers to 1 or more"),
        ("compare.rows=[din,lr,din]", "compare.rows: din stands twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(empty: str, override: str, part: str) -> None:
    assert part in refused(empty, *override.split())


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("ranker.dim", "expected KEY=VALUE"),
        ("seed.deeper=1", "'seed' is a value, not a group"),
        ("ranker.dim=[1", "not a valid value"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(empty: str, override: str, part: str) -> None:
    message = refused(empty, "seed=1", override)
    assert part in message
    assert override.partition("=")[0] in message


def test_an_unknown_configuration_is_refused_with_those_that_exist() -> None:
    assert "smoke" in refused("smokey")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in refused(str(path))
    assert "no such file" in refused(str(tmp_path / "absent.yaml"))


def test_overrides_are_read_as_yaml_and_the_last_one_wins(empty: str) -> None:
    loaded = config.load(
        empty,
        ["ranker.lr=1e-4", "reasoner.lora=null", "learner.use_gpu=true", "align=[sft]", "seed=1", "seed=2", "name=a=b"],
    )
    assert loaded.ranker.lr == 1e-4
    assert loaded.reasoner.lora is None
    assert loaded.learner.use_gpu is True
    assert loaded.align == ["sft"]
    assert loaded.seed == 2
    assert loaded.run_uri.endswith("/runs/a=b")


def test_a_day_may_be_written_as_yaml_takes_it_for_a_date(empty: str) -> None:
    quoted, bare = (config.load(empty, [f"log.start={day}"]) for day in ("'2026-01-31'", "2026-01-31"))
    assert quoted == bare and str(bare.log.start) == "2026-01-31"


def test_an_override_keeps_the_rest_of_its_group(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("ranker:\n  dim: 64\n  heads: 8\n")
    loaded = config.load(str(path), ["ranker.dim=16"])
    assert (loaded.ranker.dim, loaded.ranker.heads) == (16, 8)


def test_a_configuration_survives_a_round_trip_through_yaml(empty: str) -> None:
    loaded = config.load(empty, ["ranker.dim=64", "reasoner.lora=null"])
    assert config.validate(yaml.safe_load(yaml.safe_dump(loaded.model_dump(mode="json")))) == loaded


def test_no_setting_can_be_changed_after_loading(empty: str) -> None:
    loaded = config.load(empty)
    with pytest.raises(ValueError, match="frozen"):
        loaded.ranker.dim = 3  # type: ignore[misc]


def test_keys_lists_every_leaf() -> None:
    def leaves(value: object) -> int:
        return sum(map(leaves, value.__dict__.values())) if isinstance(value, Settings) else 1

    assert len(KEYS) == len(set(KEYS)) == leaves(Config())


def test_a_run_has_one_place_whatever_folder_a_worker_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.validate({"name": "a"}).run_uri == str(tmp_path / "runs/a")
    assert config.validate({"run_dir": "s3://bucket/{name}", "name": "a"}).run_uri == "s3://bucket/a"
    assert config.validate({"run_dir": "s3://bucket/{x}/{name}", "name": "a"}).run_uri == "s3://bucket/{x}/a"


def test_a_setting_with_another_default_says_what_it_said_before() -> None:
    told = config.commented(config.Gradient())
    assert "Highest learning rate" in told and "RG-SFT's loss on the selected query" in told
    assert "as in SmolLM2's own tuning" in config.commented(config.Sft()), "unless it says something of its own"


@pytest.mark.parametrize("name", config.available())
def test_settings_that_are_told_with_comments_are_the_same_settings(name: str) -> None:
    settings = config.load(name)
    assert config.validate(yaml.safe_load(config.commented(settings))) == settings


def test_the_shop_grows_by_a_factor_and_no_other_log_does() -> None:
    grown = config.load("ladder").scaled(2.5)
    assert (grown.world.sessions, grown.world.users) == (50_000, 30_000)
    assert grown.world.days == config.load("ladder").world.days
    with pytest.raises(ConfigError, match="the log is movielens; only the simulated shop"):
        config.load("movielens").scaled(2)
    with pytest.raises(ConfigError, match=r"world\.sessions"):
        config.load("ladder").scaled(1e-9)
    for factor in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"^--scale: .*; give a number above 0"):
            config.load("ladder").scaled(factor)


def test_what_models_were_tuned_to_are_settings_of_the_ranker() -> None:
    with pytest.raises(ConfigError, match=r"tuned and trials hold settings of ranker; .*learning_rate"):
        config.load("ladder", ["compare.tuned={din: {learning_rate: 0.1}}"])
    with pytest.raises(ConfigError, match=r"compare\.tuned\.dinn"):
        config.load("ladder", ["compare.tuned={dinn: {lr: 0.1}}"])
    with pytest.raises(ConfigError, match="one of the 5 seeds that are judged"):
        config.load("ladder", ["compare.tuning_seed=4"])


def test_where_sessions_have_several_clicks_the_auditor_hears_others_than_the_reward() -> None:
    settings = config.load("movielens")
    assert settings.reward.halves and settings.roles.audit


def test_who_names_the_rows_of_a_comparison_names_all_of_them() -> None:
    assert config.load("alignment").compare.exploratory
    named = config.load("alignment", ["compare.rows=[qe_rec]"]).compare
    assert (named.rows, named.exploratory) == (["qe_rec"], [])
    both = config.load("alignment", ["compare.exploratory=[rg_dpo]", "compare.rows=[qe_rec]"]).compare
    assert (both.rows, both.exploratory) == (["qe_rec"], ["rg_dpo"])
    with pytest.raises(ConfigError, match=r"compare: .*'lr' stands in rows and in exploratory; name it once"):
        config.load("ladder", ["compare.rows=[lr]", "compare.exploratory=[lr]"])


def test_a_ladder_without_alignment_needs_no_queries() -> None:
    settings = config.load("ladder")
    assert settings.encode.query_share == 0 and not settings.align
    with pytest.raises(ConfigError, match=r"never saw e\(x,q\)"):
        config.load("ladder", ["align=[sft]"])


@pytest.mark.parametrize("key", ["run_dir", "log.uri", "log.intents", "log.candidate_sets", "encode.kept"])
def test_keys_in_an_address_are_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: an address is written into manifests") as met:
        config.load("demo", [f"{key}=s3://name:planted@bucket/x"])
    assert "planted" not in str(met.value)
    config.load("demo", [f"{key}=s3://bucket/a@b"])
