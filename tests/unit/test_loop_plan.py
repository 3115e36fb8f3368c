"""What a run asks of the cluster and of its processes, before the first of them starts."""

from __future__ import annotations

import io
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import environment, plan

SIZE = st.integers(1, 8)
CPUS = st.sampled_from([0.25, 0.5, 1.0, 2.0])
GPUS = st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def configs(draw: st.DrawFn) -> config.Config:
    pools = {}
    for name in ("encode", "rollout"):
        pools[name] = {
            "workers": draw(SIZE),
            "cpus_per_worker": draw(CPUS),
            "gpus_per_worker": draw(GPUS),
        }
    for name in ("ranker", "learner"):
        pools[name] = {
            "workers": (workers := draw(st.sampled_from([0, 1, 2, 4]))),
            "cpus_per_worker": draw(CPUS),
            "use_gpu": draw(st.booleans()) and workers > 0,
        }
    return config.validate(pools | {"reward": {"cpus": draw(CPUS)}})


def needed(chosen: config.Config) -> tuple[float, float]:
    """Most CPUs (one of them for Ray Data) and GPUs that a stage holds."""
    pools = [chosen.encode, chosen.rollout, chosen.ranker, chosen.learner]
    cpus = [pool.workers * pool.cpus_per_worker for pool in pools] + [chosen.reward.workers * chosen.reward.cpus]
    gpus = [pool.workers * pool.gpus_per_worker for pool in (chosen.encode, chosen.rollout)]
    gpus += [pool.workers * pool.use_gpu for pool in (chosen.ranker, chosen.learner)]
    return max(cpus) + 1, max(gpus)


@settings(deadline=None)
@given(configs())
def test_a_plan_passes_exactly_where_its_largest_stage_fits(chosen: config.Config) -> None:
    cpus, gpus = needed(chosen)
    plan.check(chosen, cpus, gpus)
    with pytest.raises(ConfigError, match="CPUs"):
        plan.check(chosen, cpus - 0.25, gpus)
    if gpus:
        with pytest.raises(ConfigError, match="GPUs"):
            plan.check(chosen, cpus, gpus - 0.5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rollout": {"workers": 7}}, r"^rollout\.workers: 7 x 0\.5 CPUs .* make 4\.5; the cluster has 4\."),
        ({"encode": {"workers": 4, "cpus_per_worker": 1}}, r"^encode\.workers: 4 x 1 CPUs .* make 5; "),
        ({"ranker": {"workers": 2, "cpus_per_worker": 2}}, r"^ranker\.workers: 2 x 2 CPUs"),
        ({"reward": {"workers": 1, "cpus": 3.5}}, r"^reward\.workers: 1 x 3\.5 CPUs"),
        ({"learner": {"use_gpu": True}}, r"^learner\.workers: 2 x 1 GPUs for learners make 2; the cluster has 1\."),
        (
            {"align": ["grpo"], "grpo": {"sampler": "pool"}, "rollout": {"workers": 4}},
            r"^learner\.workers: 2 x 0\.5 CPUs for learners and 4 x 0\.5 CPUs for samplers and 1 x 0\.5 CPUs for "
            r"judges and 1 for Ray Data make 4\.5; the cluster has 4\.",
        ),
        (
            {"align": ["grpo"], "grpo": {"sampler": "pool"}, "encode": {"gpus_per_worker": 1, "workers": 1}}
            | {"learner": {"use_gpu": True, "workers": 1, "micro_batch": 16}},
            r"^learner\.workers: 1 x 1 GPUs for learners and 1 x 1 GPUs for judges make 2; the cluster has 1\.",
        ),
        ({"reasoner": {"engine": "sentence"}}, r"^reasoner\.engine: a sentence encoder writes no queries"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_refusal_names_the_setting_and_both_numbers(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan.check(config.validate(change), 4, 1)


def test_workers_bound_to_nodes_must_fit_on_those() -> None:
    chosen = config.validate({"rollout": {"workers": 4, "node_labels": {"rgalign": "rollout"}}})
    free = plan.Node({}, 64, 8)
    bound = plan.Node({"rgalign": "rollout", "zone": "a"}, 1, 0)
    plan.check_nodes(chosen, [free, bound, bound])
    sentence = r"^rollout\.workers: 4 rollout workers ask for 2 CPUs on nodes with rgalign=rollout; of 2 nodes 1 carry"
    with pytest.raises(ConfigError, match=sentence):
        plan.check_nodes(chosen, [free, bound])


def test_one_worker_must_fit_on_one_node() -> None:
    chosen = config.validate({"reward": {"workers": 1, "cpus": 3}})
    small = [plan.Node({}, 1, 0)] * 8
    plan.check_cluster(chosen, [*small, plan.Node({}, 3, 0)])
    sentence = r"^reward\.workers: one reward model asks for 3 CPUs on one node, and none of the 8 nodes has that\.$"
    with pytest.raises(ConfigError, match=sentence):
        plan.check_cluster(chosen, small)
    apart = config.validate({"encode": {"gpus_per_worker": 1, "workers": 1, "node_labels": {"a": "b"}}})
    with pytest.raises(ConfigError, match=r"asks for 0\.5 CPUs and 1 GPUs on one node, .* the 2 nodes with a=b has"):
        plan.check_cluster(apart, [plan.Node({"a": "b"}, 0, 1), plan.Node({"a": "b"}, 4, 0), plan.Node({}, 4, 1)])


def test_a_service_passes_exactly_where_its_replicas_fit() -> None:
    its = {"gateways": 2, "reasoners": 3, "rankers": 5, "cpus_per_replica": 0.1, "reasoner_gpus": 0.5}
    chosen = config.validate({"serve": its, "rollout": {"workers": 64}})
    plan.check_served(chosen, 1.0, 1.5)
    sentence = (
        r"^serve\.gateways: 2 x 0\.1 CPUs for gateways and 3 x 0\.1 CPUs for reasoners and 5 x 0\.1 CPUs for rankers "
    )
    with pytest.raises(ConfigError, match=sentence + r"make 1; the cluster has 0\.5\."):
        plan.check_served(chosen, 0.5, 1.5)
    with pytest.raises(ConfigError, match=r"^serve\.reasoners: 3 x 0\.5 GPUs for reasoners make 1\.5; .* has 1\."):
        plan.check_served(chosen, 1.0, 1.0)
    plan.check_served(config.changed(chosen, {"cluster.grows": True}), 0.0, 0.0)


def test_workers_of_one_stage_must_fit_beside_each_other_on_the_nodes_they_are_bound_to() -> None:
    gpu, more = {"rgalign": "gpu"}, {"rgalign": "gpu", "zone": "a"}
    chosen = config.validate(
        {
            "align": ["grpo"],
            "grpo": {"sampler": "pool"},
            "rollout": {"workers": 2, "gpus_per_worker": 0.5, "node_labels": more},
            "learner": {"workers": 2, "use_gpu": True, "node_labels": gpu},
        }
    )
    free, bound = plan.Node({}, 64, 8), plan.Node(more, 64, 2)
    plan.check_nodes(chosen, [free, bound, plan.Node(gpu, 64, 1)])
    sentence = (
        r"^learner\.workers: 2 x 1 GPUs for learners and 2 x 0\.5 GPUs for samplers make 3; "
        r"the nodes with rgalign=gpu have 2\."
    )
    with pytest.raises(ConfigError, match=sentence):
        plan.check_nodes(chosen, [free, bound])
    plan.check_nodes(config.changed(chosen, {"grpo.sampler": "learner"}), [free, bound])


def test_every_configuration_of_the_package_can_be_planned() -> None:
    for name in config.available():
        chosen = config.load(name)
        out = io.StringIO()
        Console(file=out, width=200).print(plan.table(chosen, [plan.Node({}, 6, 1), plan.Node({}, 5, 0)]))
        for ask in plan.asks(chosen):
            assert ask.key in out.getvalue()
            assert f"{ask.count} x {ask.worker}" in out.getvalue()
        assert f"N = {chosen.rollout.n}" in out.getvalue()
        assert re.search(r"there are .* 2 nodes.* 11 .* 1 ", out.getvalue())
        plan.check(chosen, 1e6, 1e6)
    for name in ("demo", "smoke"):
        plan.check(config.load(name), 2, 0)


def test_a_local_ray_has_the_cpus_asked_for_or_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.local_cpus(config.validate({"cluster": {"num_cpus": 5}})) == 5
    for cores, expected in ((16, 16), (1, 2), (None, 2)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert plan.local_cpus(config.Config()) == expected


def prepared(monkeypatch: pytest.MonkeyPatch, mine: dict[str, str], **settings: dict) -> dict[str, str]:
    """The environment after `prepare`, from one that holds `mine` alone."""
    monkeypatch.setattr(os, "environ", dict(mine))
    environment.prepare(config.validate(settings))
    return dict(os.environ)


def test_a_local_ray_is_closed_to_the_network_by_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (prepared(monkeypatch, {}) for _ in range(2))
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["OMP_NUM_THREADS"] == "1"
    assert os.path.isfile(first["RAY_DATA_LOGGING_CONFIG"])


def test_preparing_twice_keeps_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(monkeypatch, {})
    environment.prepare(config.Config())
    assert dict(os.environ) == first


@pytest.mark.parametrize(
    "mine",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"},
        {"RAY_AUTH_TOKEN_PATH": "/p"},
        {"OMP_NUM_THREADS": "8", "TOKENIZERS_PARALLELISM": "true", "DS_ACCELERATOR": "cuda"},
    ],
    ids=lambda mine: next(iter(mine)) + "=" + next(iter(mine.values())),
)
def test_the_users_own_settings_stand(monkeypatch: pytest.MonkeyPatch, mine: dict[str, str]) -> None:
    found = prepared(monkeypatch, mine)
    assert found.items() >= mine.items()
    if "RAY_AUTH_MODE" in mine or "RAY_AUTH_TOKEN_PATH" in mine:
        assert found.get("RAY_AUTH_TOKEN") == mine.get("RAY_AUTH_TOKEN")


def test_a_cluster_decides_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepared(monkeypatch, {}, cluster={"address": "auto"})
    assert found == environment.WORKERS


@pytest.mark.parametrize(("use_gpu", "accelerator"), [(False, "cpu"), (True, "cuda")])
def test_deepspeed_is_told_what_to_run_on(monkeypatch: pytest.MonkeyPatch, use_gpu: bool, accelerator: str) -> None:
    assert prepared(monkeypatch, {}, learner={"use_gpu": use_gpu})["DS_ACCELERATOR"] == accelerator


def test_workers_of_a_cluster_hear_where_models_lie_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"RGALIGN_CACHE": "/c", "HF_HUB_OFFLINE": "1", "RAY_AUTH_TOKEN": "secret", "HOME": "/h"}
    monkeypatch.setattr(os, "environ", mine)
    assert environment.for_workers() == environment.WORKERS | {"RGALIGN_CACHE": "/c", "HF_HUB_OFFLINE": "1"}
