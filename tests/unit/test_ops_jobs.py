"""What travels to a cluster, and what is refused before it does; against a client that only takes notes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobType
from ray.util.state.exception import ServerUnavailable
from typer.testing import CliRunner

from rgalign_ray import cli, config
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.logs.prompts import Template
from rgalign_ray.ops import jobs, local_cluster

TEMPLATE = "short.yaml"


@dataclass
class Client:
    """As `JobSubmissionClient`."""

    known: list[JobDetails] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    fails: Exception | None = None

    def get_address(self) -> str:
        return "http://there"

    def list_jobs(self) -> list[JobDetails]:
        return self.known

    def get_job_info(self, job_id: str) -> JobDetails:
        return next(job for job in self.known if job.submission_id == job_id)

    def submit_job(self, **request: Any) -> str:
        if self.fails:
            raise self.fails
        folder = Path(request["runtime_env"]["working_dir"])
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.taken.append(request)
        self.known.append(details(request["submission_id"], metadata=request["metadata"]))
        return str(request["submission_id"])


def details(name: str, status: JobStatus = JobStatus.RUNNING, **more: Any) -> JobDetails:
    given = {"type": JobType.SUBMISSION, "entrypoint": "", "status": status, "submission_id": name, "start_time": 5000}
    return JobDetails(**(given | more))


def settings(folder: Path, **more: Any) -> config.Config:
    return config.validate({"name": "shop", "run_dir": str(folder / "run")} | more)


def quiet(line: str) -> None:
    pass


def test_the_package_the_settings_and_the_files_they_name_travel_and_nothing_else(tmp_path: Path) -> None:
    own = tmp_path / TEMPLATE
    template = Template.load("shop")
    own.write_text(template.model_dump_json())
    (tmp_path / "secret.txt").write_text("not this")
    client = Client()
    chosen = settings(tmp_path, prompt={"template": str(own)})
    jobs.submit(client, "align", chosen, say=quiet)
    request = client.taken[0]
    assert request["entrypoint"] == (
        "python -m rgalign_ray.cli loop --until align_1 --config run.yaml --set cluster.address=auto"
    )
    rest = {name for name in client.files if not name.startswith("rgalign_ray/")}
    sent = json.loads(client.files["run.yaml"])
    assert rest == {"run.yaml", sent["prompt"]["template"]}
    assert client.files[sent["prompt"]["template"]] == own.read_bytes()
    assert sent["run_dir"] == str(tmp_path / "run")
    assert "rgalign_ray/configs/smoke.yaml" in client.files
    assert not [name for name in client.files if name.endswith(".pyc")]
    sent["prompt"]["template"] = str(own)
    assert config.validate(sent) == chosen.model_copy(update={"run_dir": chosen.run_uri})


def test_hidden_files_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rgalign_ray"
    (package / ".cache").mkdir(parents=True)
    for name in ("__init__.py", ".env", ".cache/a.bin"):
        (package / name).write_text("planted")
    monkeypatch.setattr(jobs.rgalign_ray, "__file__", str(package / "__init__.py"))
    client, told = Client(), []
    jobs.submit(client, "loop", settings(tmp_path), say=told.append)
    assert set(client.files) == {"rgalign_ray/__init__.py", "run.yaml"}
    assert told[0].startswith("sending 2 files, ")


def test_a_service_does_not_leave_its_keys_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGALIGN_SERVE_KEYS", "shop a-key-of-the-shop")
    client = Client()
    with pytest.raises(ConfigError, match=r"^\$RGALIGN_SERVE_KEYS: .* does not travel, .* by serve\.keys") as met:
        jobs.submit(client, "serve", settings(tmp_path), say=quiet)
    assert "a-key" not in str(met.value) and not client.taken
    jobs.submit(client, "serve", settings(tmp_path, serve={"keys": "/etc/keys"}), say=quiet)
    jobs.submit(client, "loop", settings(tmp_path / "other"), say=quiet)
    assert len(client.taken) == 2


def test_a_service_is_held_to_its_replicas_and_a_run_to_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SimpleNamespace(state="ALIVE", labels={}, resources_total={"CPU": 4.0})
    monkeypatch.setattr(jobs, "list_nodes", lambda **_: [node, SimpleNamespace(state="DEAD")])
    client: Any = Client()
    large = settings(tmp_path, rollout={"workers": 64})
    jobs.check(client, "serve", large)
    with pytest.raises(ConfigError, match=r"^rollout\.workers"):
        jobs.check(client, "loop", large)
    served = settings(tmp_path, serve={"rankers": 64})
    jobs.check(client, "loop", served)
    with pytest.raises(
        ConfigError, match=r"^serve\.gateways: .* and 64 x 0\.3 CPUs for rankers make 19\.8; .* has 4\."
    ):
        jobs.check(client, "serve", served)


def test_a_file_that_is_missing_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^features\.spec: no\.yaml"):
        jobs.submit(Client(), "loop", settings(tmp_path, features={"spec": "no.yaml"}), say=quiet)


def test_what_is_too_large_is_refused_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_PACKAGE_MB", 0.1)
    with pytest.raises(ConfigError, match=r"above 0; the largest file is rgalign_ray/\S+ \(0 MB\)"):
        jobs.submit(Client(), "loop", settings(tmp_path), say=quiet)


def test_two_jobs_are_not_given_one_run_directory(tmp_path: Path) -> None:
    client = Client()
    first = jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    with pytest.raises(ConfigError, match=rf"^run_dir: {first} is at work on {tmp_path}/run; "):
        jobs.submit(client, "evaluate", settings(tmp_path), say=quiet)
    jobs.submit(client, "loop", settings(tmp_path / "other"), say=quiet)
    client.known[0] = client.known[0].model_copy(update={"status": JobStatus.FAILED})
    assert jobs.submit(client, "loop", settings(tmp_path), say=quiet) != first


def test_a_service_and_a_run_may_share_a_run_directory(tmp_path: Path) -> None:
    client = Client()
    serves = jobs.submit(client, "serve", settings(tmp_path), say=quiet)
    first = jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    with pytest.raises(ConfigError, match=rf"^run_dir: {first} is at work"):
        jobs.submit(client, "loop", settings(tmp_path, run_dir=f"{tmp_path}/run/"), say=quiet)
    with pytest.raises(ConfigError, match=rf"^serve: {serves} serves on this cluster; `rgalign stop {serves}` ends it"):
        jobs.submit(client, "serve", settings(tmp_path / "another"), say=quiet)
    client.known[0] = client.known[0].model_copy(update={"status": JobStatus.STOPPED})
    assert jobs.submit(client, "serve", settings(tmp_path), say=quiet) != serves


def test_a_service_beside_a_run_of_its_name_can_be_reached(tmp_path: Path) -> None:
    client = Client()
    serves = jobs.submit(client, "serve", settings(tmp_path), say=quiet)
    runs = jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    for number in (0, 1):  # the later one began later
        client.known[number] = client.known[number].model_copy(update={"start_time": 5000 + number})
    assert jobs.latest(client, "shop").id == runs and jobs.latest(client, serves).id == serves
    client.known[1] = client.known[1].model_copy(update={"status": JobStatus.FAILED})
    assert jobs.latest(client, "shop").id == serves, "what is at work, not what was last"
    assert jobs.latest(client, "shop", over=True).id == runs


def test_paths_mean_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    named = config.validate(
        {
            "log": {"source": "parquet", "uri": "log", "intents": "s3://bucket/intents", "candidate_sets": "sets"},
            "encode": {"kept": "~/kept"},
            "reasoner": {"model": "model"},
            "teachers": [{"name": "same"}, {"name": "big", "model": "model"}],
            "serve": {"variants": [{"name": "a", "run_dir": "runs/a"}, {"name": "b"}], "store": "store"},
        }
    )
    data = jobs.anywhere(named)
    assert [data["log"][name] for name in ("uri", "intents", "candidate_sets")] == [
        f"{tmp_path}/log",
        "s3://bucket/intents",
        f"{tmp_path}/sets",
    ]
    assert data["encode"]["kept"] == str(Path("~/kept").expanduser())
    assert data["reasoner"]["model"] == data["teachers"][1]["model"] == f"{tmp_path}/model"
    assert data["teachers"][0]["model"] is None and data["compare"]["encoder"]["model"] == "minilm"
    assert (
        data["serve"]["variants"][0]["run_dir"] == f"{tmp_path}/runs/a"
        and data["serve"]["store"] == f"{tmp_path}/store"
    )
    config.validate(data)


def test_a_run_goes_on_with_the_settings_it_had_whatever_folder_it_is_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    Path(TEMPLATE).write_text(Template.load("shop").model_dump_json())
    client = Client()
    chosen = config.validate({"name": "shop", "seed": 3, "prompt": {"template": TEMPLATE}})
    jobs.submit(client, "rollout", chosen, say=quiet)
    monkeypatch.chdir(tmp_path / "there")
    before = client.files["run.yaml"]
    client.known[0] = client.known[0].model_copy(update={"status": JobStatus.STOPPED})
    client.known.append(details("another's", metadata={}))
    again = jobs.resume(client, jobs.latest(client, "shop"), say=quiet)
    assert again == client.known[-1].submission_id
    assert client.files["run.yaml"] == before
    assert client.taken[1]["entrypoint"] == client.taken[0]["entrypoint"]


def test_stopping_waits_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster answers at once and ends the job later: a run that is resumed in between would be refused."""
    asked = 0

    class Ending(Client):
        def stop_job(self, job_id: str) -> bool:
            return not self.get_job_info(job_id).status.is_terminal()

        def get_job_info(self, job_id: str) -> JobDetails:
            nonlocal asked
            asked += 1
            if asked > 3:
                self.known[0] = self.known[0].model_copy(update={"status": JobStatus.STOPPED})
            return super().get_job_info(job_id)

    monkeypatch.setattr(jobs, "ASK_EVERY_S", 0.0)
    client = Ending()
    jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    assert jobs.stop(client, jobs.latest(client, "shop").id)
    assert jobs.resume(client, jobs.latest(client, "shop"), say=quiet)
    assert asked > 3

    client.known[0] = client.known[-1]
    monkeypatch.setattr(jobs, "ENDED_DEADLINE_S", 0.0)
    asked = -9
    with pytest.raises(InfrastructureError, match="told to stop, and still at work after 0 s"):
        jobs.stop(client, jobs.latest(client, "shop").id)


@pytest.mark.parametrize("answer", [True, False])
def test_an_interrupt_asks_whether_the_job_shall_end_as_well_and_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: bool
) -> None:
    class Stopping(Client):
        def stop_job(self, job_id: str) -> bool:
            self.known[0] = self.known[0].model_copy(update={"status": JobStatus.STOPPED})
            return True

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    client = Stopping()
    job = jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    monkeypatch.setattr(jobs, "follow", interrupted)
    monkeypatch.setattr(cli.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(cli.typer, "confirm", lambda *_, **__: answer)
    with pytest.raises(cli.typer.Exit) as left:
        cli._follow(client, job, wait=True)  # type: ignore[arg-type]
    assert left.value.exit_code == cli.INTERRUPTED
    assert jobs.latest(client, "shop").over == answer
    assert ("is stopped" if answer else "goes on") in capsys.readouterr().err


def test_a_jobs_id_can_stand_in_an_address(tmp_path: Path) -> None:
    made = jobs.submit(Client(), "loop", settings(tmp_path, name="week 3/shop?"), say=quiet)
    assert made.startswith("week-3-shop--loop-")


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    client = Client()
    with pytest.raises(ConfigError, match=r"^tea: no run of that name on http://there \(there: none\)"):
        jobs.latest(client, "tea")
    jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    with pytest.raises(ConfigError, match=r"\(there: shop\)"):
        jobs.latest(client, "tea")


@pytest.mark.parametrize("failure", [ConnectionError("gone\nfar"), RuntimeError("500"), AuthenticationError("no")])
def test_a_cluster_that_does_not_take_it_is_one_sentence(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(InfrastructureError, match=r"^--address http://there: (gone|500|no)") as met:
        jobs.submit(Client(fails=failure), "loop", settings(tmp_path), say=quiet)
    assert "\n" not in str(met.value)


def test_a_head_that_has_just_started_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(fails=RuntimeError("status code 500: No available agent to submit job, please try again later."))
    monkeypatch.setattr(jobs, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(jobs, "AGENT_DEADLINE_S", 0.05)
    with pytest.raises(InfrastructureError, match="No available agent"):
        jobs.submit(client, "loop", settings(tmp_path), say=quiet)

    def ready(seconds: float) -> None:
        client.fails = None

    monkeypatch.setattr(jobs.time, "sleep", ready)
    assert jobs.submit(client, "loop", settings(tmp_path), say=quiet) == client.known[-1].submission_id


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, InfrastructureError.exit_code),
        (JobStatus.FAILED, 137, InfrastructureError.exit_code),
        (JobStatus.STOPPED, None, InfrastructureError.exit_code),
        (JobStatus.FAILED, None, InfrastructureError.exit_code),
    ],
)
def test_the_exit_status_is_the_drivers(status: JobStatus, code: int | None, expected: int) -> None:
    class Told(Client):
        async def tail_job_logs(self, job_id: str) -> Any:
            for line in ("one\n", "two\n"):
                yield line

    told: list[str] = []
    client = Told([details("job", status, driver_exit_code=code, message="it fell")])
    assert jobs.follow(client, "job", told.append) == expected
    assert told[:2] == ["one\n", "two\n"]
    assert (told[2:] == []) == (code is not None)


def test_the_command_line_names_the_verbs_and_the_cluster_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    met = CliRunner().invoke(cli.app, ["submit", "dance"]).exception
    assert isinstance(met, ConfigError) and str(met).startswith("submit dance: not one of prepare, train_ranker, ")
    told = " ".join(CliRunner().invoke(cli.app, ["submit", "--help"], env={"COLUMNS": "200"}).output.split())
    assert ", ".join(jobs.VERBS) in told
    met = CliRunner().invoke(cli.app, ["status"]).exception
    assert isinstance(met, ConfigError) and "`rgalign cluster up` starts one" in str(met)
    met = CliRunner().invoke(cli.app, ["cluster", "add"]).exception
    assert isinstance(met, ConfigError) and "`rgalign cluster up` starts one" in str(met)
    met = CliRunner().invoke(cli.app, ["cluster", "add", "--label", "rollout"]).exception
    assert isinstance(met, ConfigError) and "expected NAME=VALUE" in str(met)


def test_a_cluster_whose_head_died_is_not_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    assert local_cluster.running() is None
    assert local_cluster.down() == 0
    local_cluster.record().parent.mkdir()
    gone = {"address": "a", "dashboard": "b", "nodes": [{"pid": 1, "created": 0.5}]}
    local_cluster.record().write_text(json.dumps(gone))
    assert local_cluster.running() is None, "another process has the id by now"
    assert local_cluster.down() == 0, "and is left alone"
    assert not local_cluster.record().exists()


def test_a_node_counts_once_it_can_be_given_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard answers before its own node has told what it has, and jobs were refused then."""
    up, dead = ("up", "ALIVE", {"CPU": 2.0}), ("dead", "DEAD", {"CPU": 2.0})
    told: list[Any] = [ServerUnavailable, [], [("up", "ALIVE", {})], [up, dead]]

    def listed(address: str) -> list[SimpleNamespace]:
        if not isinstance(found := told.pop(0), list):
            raise found
        return [SimpleNamespace(node_id=node, state=state, resources_total=has) for node, state, has in found]

    monkeypatch.setattr("ray.util.state.list_nodes", listed)
    assert [local_cluster._alive("http://there") for _ in range(len(told))] == [set(), set(), set(), {"up"}]


def test_table_of_jobs() -> None:
    from rich.console import Console

    client = Client(
        [details("shop-1", JobStatus.FAILED, driver_exit_code=3, end_time=65_000, metadata={jobs.RUN: "shop"})]
    )
    console = Console(width=120)
    with console.capture() as shown:
        console.print(jobs.table(jobs.list_jobs(client)))
    assert "failed (3)" in shown.get() and "1 min" in shown.get()


def test_a_cluster_that_is_gone_as_a_run_is_resumed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    jobs.submit(client, "loop", settings(tmp_path), say=quiet)
    job = jobs.latest(client, "shop")

    def gone(job_id: str) -> JobDetails:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(client, "get_job_info", gone)
    with pytest.raises(InfrastructureError, match=r"^--address http://there: no route to host"):
        jobs.resume(client, job, say=quiet)
