"""Run directories in an object store, for real: an S3 server on loopback, and what may go wrong with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import s3_server
from s3_server import BUCKET, Trouble
from typer.testing import CliRunner

from rgalign_ray import cli, storage
from rgalign_ray.errors import ConfigError, refused_by_storage
from rgalign_ray.loop import controller
from rgalign_ray.ops import runs


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server.serving() as found:
        yield found


def use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment(port).items():
        monkeypatch.setenv(name, value)


def finish(folder: str, key: str) -> None:
    storage.write_table(storage.join(folder, "part", "dt=1", "rows.parquet"), pa.table({"a": [1, 2]}))
    storage.write_json(storage.join(folder, storage.MANIFEST), storage.Manifest(stage="s", key=key).model_dump())


def test_what_is_written_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(port, monkeypatch)
    root = f"s3://{BUCKET}/whole"
    artefact = storage.join(root, "artefact")
    with storage.writing(artefact, resume_key="k") as work:
        assert storage.read_manifest(artefact) is None
        finish(work, "new")
    found = storage.read_manifest(artefact)
    assert found is not None and found.key == "new"
    assert storage.read_table(storage.join(artefact, "part")).to_pydict() == {"a": [1, 2], "dt": ["1", "1"]}
    storage.write_json(storage.join(root, "other", "x.json"), {"b": 1})
    storage.keep_only(root, "artefact")
    names = [file.removeprefix(root) for file in storage.list_files(root)]
    assert names == ["/artefact/manifest.json", "/artefact/part/dt=1/rows.parquet"]
    storage.delete(root)
    assert storage.list_files(root) == [] and not storage.exists(artefact)


def test_what_is_redone_under_another_key_starts_empty(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(port, monkeypatch)
    artefact = f"s3://{BUCKET}/redone/artefact"

    def tried(key: str | None, unit: str, whole: bool) -> list[str]:
        """What a try finds, which then writes a unit and, if it lives, the manifest."""
        with suppress(RuntimeError), storage.writing(artefact, resume_key=key) as work:
            found = [storage.pure_path(file).name for file in storage.list_files(work)]
            storage.write_json(storage.join(work, "units", unit), key)
            if not whole:
                raise RuntimeError("killed")
            finish(work, key or "")
        return found

    assert tried("a", "a0", whole=False) == []
    assert tried("a", "a1", whole=False) == ["a0"], "its own"
    assert tried("b", "b0", whole=False) == []
    assert tried("b", "b1", whole=True) == ["b0"]
    files = ["manifest.json", "part/dt=1/rows.parquet", "units/b0", "units/b1"]
    everything = storage.filesystem(artefact)[0].get_file_info(pafs.FileSelector(f"{BUCKET}/redone", recursive=True))
    assert sorted(each.path for each in everything if each.type == pafs.FileType.File) == [
        f"{BUCKET}/redone/artefact/{file}" for file in files
    ], "nor is a marker left"
    assert tried(None, "c0", whole=False) == []
    assert tried(None, "c1", whole=True) == []
    found = storage.read_manifest(artefact)
    assert found is not None and found.key == ""


@pytest.mark.parametrize("form", ["s3://{}/forms/", "s3://{}/forms?{}", "s3://{}/forms/?{}"])
def test_a_slash_at_the_end_and_a_server_in_the_query_keep_the_bucket(
    port: int, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    use(port, monkeypatch)
    if "?" in form:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    folder = form.format(BUCKET, f"scheme=http&endpoint_override=127.0.0.1:{port}")
    for name in ("old", "new run"):
        storage.write_json(storage.join(folder, name, runs.MARKS[0]), {})
        with storage.writing(storage.join(folder, name, "log"), resume_key="k") as work:
            finish(work, "k")
    there = runs.list_runs(folder)
    assert sorted((run.name, run.artefacts) for run in there) == [("new run", 1), ("old", 1)]
    assert {run.uri for run in there} == {storage.join(folder, name) for name in ("old", "new run")}
    log = storage.join(folder, "new run", "log", "part")
    assert storage.read_table(log).to_pydict() == {"a": [1, 2], "dt": ["1", "1"]}
    assert [storage.read_table(file).num_rows for file in storage.list_files(log)] == [2]
    removed = CliRunner().invoke(cli.app, ["runs", "prune", folder, "--keep", "0", "--older-than-days", "0", "--yes"])
    assert removed.exit_code == 0 and "2 of 2 runs" in removed.stdout
    assert runs.list_runs(folder) == [] and storage.list_files(folder) == []


def test_a_json_file_is_one_object_and_no_rename(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = Trouble()
    with s3_server.troubled(port, trouble) as behind:
        use(behind, monkeypatch)
        storage.write_json(f"s3://{BUCKET}/one/x.json", {"a": 1})
    assert {path.partition("?")[0] for method, path in trouble.seen if method in ("PUT", "POST", "DELETE")} == {
        f"/{BUCKET}/one/x.json"
    }


@pytest.mark.parametrize("status", [403, 0])
def test_a_write_that_fails_halfway_leaves_nothing_to_read(
    port: int, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The table is written, the manifest is not; `status` 0 breaks the connection."""
    artefact = f"s3://{BUCKET}/half-{status}/artefact"
    trouble = Trouble()
    with s3_server.troubled(port, trouble) as behind:
        use(behind, monkeypatch)
        with storage.writing(artefact) as work:
            finish(work, "old")
        trouble.spoil = lambda method, path: (
            status if method in ("PUT", "POST") and f"/{storage.MANIFEST}" in path else None
        )
        with pytest.raises(OSError, match="AWS Error") as met, storage.writing(artefact) as work:
            finish(work, "new")
        assert refused_by_storage(met.value)
        assert storage.list_files(storage.join(artefact, "part")), "written before the failure"
        assert storage.read_manifest(artefact) is None, "neither the old nor half of the new"
        trouble.spoil = lambda method, path: None
        with storage.writing(artefact) as work:
            finish(work, "new")
        found = storage.read_manifest(artefact)
        assert found is not None and found.key == "new"


def test_a_slow_server_is_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = Trouble(pause_s=1.0)
    with s3_server.troubled(port, trouble) as behind:
        use(behind, monkeypatch)
        storage.write_json(f"s3://{BUCKET}/slow.json", {"a": 1})
        assert storage.read_json(f"s3://{BUCKET}/slow.json") == {"a": 1}
    assert len(trouble.seen) > 2


def test_keys_that_are_refused_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server.serving(free_actions=1) as port:  # that of making the bucket
        use(port, monkeypatch)
        monkeypatch.setattr("sys.argv", ["rgalign", "loop", "--config", "smoke", "--run-dir", f"s3://{BUCKET}/x"])
        monkeypatch.setattr(controller, "connect", lambda config: pytest.fail("no Ray is started for this"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == ConfigError.exit_code
    told = capsys.readouterr().err
    *_, last = told.splitlines()
    assert last.startswith(f"error: run_dir: s3://{BUCKET}/x cannot be written (") and "ACCESS_DENIED" in last
    assert "Traceback" not in told and s3_server.SECRET not in told
