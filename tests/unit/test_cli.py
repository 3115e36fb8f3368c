from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from logs_data import INTENTS, SPEC, session, table, write
from ray.exceptions import ObjectStoreFullError

from rgalign_ray import __version__, cli, config, storage
from rgalign_ray.errors import DataError, InfrastructureError

HEAVY = ("torch", "ray", "transformers", "numpy", "pyarrow")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the console script inside this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["rgalign", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\n")
    return str(path)


@pytest.mark.parametrize("arguments", [["--help"], ["loop", "--help"], ["prepare", "--help"], ["version"]])
def test_help_imports_neither_torch_nor_ray(arguments: list[str]) -> None:
    done = python(
        f"""
import sys
from rgalign_ray import cli
sys.argv = ["rgalign", *{arguments!r}]
try:
    cli.main()
except SystemExit as done:
    assert not done.code, done.code
found = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported {{found}}" if found else 0)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_package_and_its_configuration_import_neither_torch_nor_ray() -> None:
    done = python(
        "import sys, rgalign_ray, rgalign_ray.config, rgalign_ray.errors\n"
        "sys.exit('heavy' if {'torch', 'ray'} & set(sys.modules) else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_a_loop_starts_without_the_libraries_of_its_workers() -> None:
    done = python(
        "import sys, rgalign_ray.loop.controller\n"
        "found = {'transformers', 'trl', 'peft', 'deepspeed', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setting", ["features.spec", "prompt.template"])
def test_a_plan_finds_a_missing_file_that_the_settings_name(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--set", f"{setting}=nowhere.yaml"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "nowhere.yaml" in said and "Traceback" not in said


@pytest.mark.parametrize("command", ["loop", "plan", "config"])
@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (["--config", "no-such-config"], "no-such-config"),
        (["--config", "/no/such/file.yaml"], "no such file"),
        (["--set", "rollout.temprature=1"], "rollout.temperature"),
        (["--set", "rollout.n=many"], "rollout.n"),
        (["--set", "rollout.n"], "KEY=VALUE"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    command: str,
    wrong: list[str],
    part: str,
    small: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [command, *(wrong if "--config" in wrong else ["--config", small, *wrong])]
    assert run(arguments, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_the_console_script_shows_no_traceback(small: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from rgalign_ray.cli import main; main()", "config", "-c", small, "-s", "sed=1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "error: sed: no such setting; the nearest is seed.\n"


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name_or_path: str, overrides: list[str] | None) -> None:
        raise error

    monkeypatch.setattr(cli, "_load", fail)


def test_a_full_disk_is_one_line_and_exit_code_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "token_hex", lambda length: "half")
    (tmp_path / "settled.json.tmp-half").symlink_to("/dev/full")
    assert run(["loop", "--config", "smoke", "--run-dir", str(tmp_path)], monkeypatch) == 4
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: no space is left on the disk; free some, and the same command goes on."
    )


def test_a_full_object_store_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(ObjectStoreFullError("1 GB"), monkeypatch)
    assert run(["config"], monkeypatch) == 4
    assert capsys.readouterr().err.startswith("error: cluster.object_store_mb: Ray's object store is too small")


def test_a_fault_of_an_input_exits_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(DataError("sessions: column 'ts' is missing."), monkeypatch)
    assert run(["config"], monkeypatch) == 3
    assert capsys.readouterr().err == "error: sessions: column 'ts' is missing.\n"


def test_infrastructure_that_failed_for_good_exits_with_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(InfrastructureError("no cluster answered"), monkeypatch)
    assert run(["config"], monkeypatch) == 4
    assert capsys.readouterr().err == "error: no cluster answered\n"
    met = InfrastructureError("no worker answered")
    met.__cause__ = ZeroDivisionError("in the worker")
    fail_with(met, monkeypatch)
    assert run(["config"], monkeypatch) == 4
    err = capsys.readouterr().err
    assert "Traceback" in err and "in the worker" in err and "no worker answered" in err


def test_a_store_that_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(OSError("When reading 'x':\nAWS Error ACCESS_DENIED during GetObject operation: no."), monkeypatch)
    assert run(["config"], monkeypatch) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: storage: When reading 'x': AWS Error ACCESS_DENIED") and err.count("\n") == 1


def test_a_bug_keeps_its_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError("a bug"), monkeypatch)
    monkeypatch.setattr(sys, "argv", ["rgalign", "config"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_config_prints_a_file_that_loads_to_the_same_settings(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "--config", small, "--set", "ranker.dim=64"], monkeypatch) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert config.load(str(printed)) == config.load(small, ["ranker.dim=64"])
    assert "  # Queries that the policy samples per session.\n  n: 4\n" in printed.read_text()
    assert next(iter(yaml.safe_load(printed.read_text()))) == "name"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def fake_controller(monkeypatch: pytest.MonkeyPatch, run_: object) -> None:
    import types

    module = types.ModuleType("rgalign_ray.loop.controller")
    module.run = run_  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rgalign_ray.loop.controller", module)


def test_loop_hands_the_settings_and_the_run_directory_to_the_controller(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str, str | None]] = []
    fake_controller(monkeypatch, lambda settings, until: seen.append((settings.seed, settings.run_uri, until)))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run(["loop", "-c", small, "-s", "seed=7", "--run-dir", "/somewhere/007"], monkeypatch) == 0
    assert run(["loop", "-c", small, "--run-dir", "/somewhere/007", "--until", "align_1"], monkeypatch) == 0
    assert seen == [(7, "/somewhere/007", None), (0, "/somewhere/007", "align_1")]


def test_an_interrupted_loop_says_how_to_resume_and_exits_with_130(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: config.Config, until: str | None) -> None:
        raise KeyboardInterrupt

    fake_controller(monkeypatch, interrupted)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run(["loop", "-c", small], monkeypatch) == 130
    place = os.path.abspath("runs/small")
    assert capsys.readouterr().err.strip() == f"Interrupted; the same command resumes from {place}."


def test_the_shop_reads_no_folder(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "shop", "--out", str(tmp_path), "--folder", str(tmp_path), "-c", small]
    assert run(arguments, monkeypatch) == 2
    assert "--folder" in capsys.readouterr().err


def test_a_log_is_not_prepared_into_a_folder_that_holds_files(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "log"
    (out / "sessions").mkdir(parents=True)
    world = ["--set", "world={sessions: 40, users: 20, days: 8}"]
    arguments = ["prepare", "shop", "--out", str(out), "-c", small, *world]
    assert run(arguments, monkeypatch) == 0, "empty folders hold nothing"
    before = {file: file.read_bytes() for file in out.rglob("*.parquet")}
    capsys.readouterr()
    assert run(arguments, monkeypatch) == 2
    assert capsys.readouterr().err == f"error: --out: {out} is not empty; name another folder, or remove it.\n"
    assert {file: file.read_bytes() for file in out.rglob("*.parquet")} == before


LOGGED = table(*(session(i) for i in range(60)))
LOG = ("log.source=parquet", "roles.test_days=0", "reasoner.model=tiny")
BAD_LOGS = {
    "the spec reads a column that is not there": (
        lambda folder: write(folder, LOGGED.drop_columns(["days_late"])),
        [],
        "0.parquet: column 'days_late' is missing; the feature spec reads it (numeric).",
    ),
    "labels are numbers, NaN among them": (
        lambda folder: write(folder, with_clicks(pa.array([[math.nan, 0.0, 0.0]] * LOGGED.num_rows))),
        [],
        "0.parquet: column 'clicks' is list<element: double>; expected list<item: bool>.",
    ),
    "every label is null": (
        lambda folder: write(folder, with_clicks(pa.nulls(LOGGED.num_rows, pa.list_(pa.bool_())))),
        [],
        "source: no sound session is left; 60 of 60 rows have 'clicks_length'.",
    ),
    "an intent is there twice": (
        lambda folder: write(folder, LOGGED, intents=pa.concat_tables([INTENTS, INTENTS.slice(2)])),
        [],
        "intents.parquet: column 'intent_id' has 'refund' 2 times; expected each once.",
    ),
    "a role without sessions": (
        lambda folder: write(folder, LOGGED),
        ["roles.valid=0", "roles.test=0.25"],
        "role valid: none of the log's 60 sessions has it; raise roles.valid (now 0), "
        "change roles.test_days (now 0) or read more.",
    ),
}


def with_clicks(clicks: pa.Array) -> pa.Table:
    return LOGGED.set_column(LOGGED.column_names.index("clicks"), "clicks", clicks)


@pytest.mark.parametrize(("spoil", "changes", "sentence"), BAD_LOGS.values(), ids=BAD_LOGS.keys())
def test_a_bad_log_is_one_sentence_without_a_traceback(
    spoil: Callable[[Path], Path],
    changes: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the loop's own first stages, which need no Ray."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    prompt = {"version": "1", "prefix": "", "session": "{{ status }}", "suffix": "", "item": "{{ title }}"}
    (tmp_path / "prompt.yaml").write_text(yaml.safe_dump(prompt))
    (tmp_path / "mine.yaml").write_text(f"name: mine\nprompt: {{template: {tmp_path / 'prompt.yaml'}}}\n")
    files = {"log.uri": spoil(tmp_path), "log.intents": tmp_path / "intents.parquet", "run_dir": tmp_path / "run"}
    sets = [*LOG, *changes, f"features.spec={tmp_path / 'spec.yaml'}", *(f"{k}={v}" for k, v in files.items())]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    arguments = [part for one in sets for part in ("--set", one)]
    assert run(["loop", "--config", str(tmp_path / "mine.yaml"), *arguments], monkeypatch) == 3
    out, err = capsys.readouterr()
    *_, last = err.strip().split("\n")
    assert last.startswith("error: ")
    assert last.removeprefix("error: ").removeprefix(f"{tmp_path}/").removeprefix("source/") == sentence
    assert "Traceback" not in out + err
    assert not (tmp_path / "run" / "sessions").exists(), "what is refused leaves no artefact"


def test_tau_retail_needs_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "tau_retail", "--out", str(tmp_path), "--config", "tau_retail"]
    assert run(arguments, monkeypatch) == 2
    assert "log.uri" in capsys.readouterr().err
    assert run([*arguments, "--folder", str(tmp_path / "nowhere")], monkeypatch) == 3
    assert "users.json: no such file" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_in_a_sentence(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(["prepare", "shop", "--out", str(tmp_path / "file" / "log"), "-c", small], monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: --out: {tmp_path}/file/log cannot be written (")


@pytest.mark.parametrize("command", [["runs", "list"], ["runs", "prune"], ["lineage"], ["prepare", "shop", "--out"]])
def test_an_address_with_a_key_is_refused_and_the_key_not_repeated(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "s3://name:planted@bucket/x"], monkeypatch) == DataError.exit_code
    told = capsys.readouterr()
    assert "the address holds a key" in told.err and "planted" not in told.out + told.err
