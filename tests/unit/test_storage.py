"""Artefacts are whole or absent, whatever is killed when."""

from __future__ import annotations

import os
import posixpath
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray import storage
from rgalign_ray.errors import ConfigError, DataError, is_no_space

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)

DIES = """
import os, signal, sys
from rgalign_ray import storage

place, moment = sys.argv[1:]
real = storage.filesystem


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Stream:
    def __init__(self, stream):
        self.stream = stream
    def __enter__(self):
        return self
    def __exit__(self, *_):
        die()
    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()


class Filesystem:
    def __init__(self, fs):
        self.fs = fs
    def __getattr__(self, name):
        if name == "move" and moment == "before the rename":
            return die
        if name == "open_output_stream" and moment == "half written":
            return lambda path: Stream(self.fs.open_output_stream(path))
        return getattr(self.fs, name)


def filesystem(uri):
    fs, path = real(uri)
    return Filesystem(fs), path


storage.filesystem = filesystem
storage.write_bytes(place, b"new" * 1000)
"""


def finish(work: str, **changes: object) -> None:
    """Writes a manifest, as the last act of a stage."""
    manifest = storage.Manifest(stage="s", key="k").model_copy(update=changes)
    storage.write_json(storage.join(work, storage.MANIFEST), manifest.model_dump())


def write_and_fail(place: str, resume_key: str | None = None) -> None:
    with storage.writing(place, resume_key=resume_key) as work:
        storage.write_bytes(storage.join(work, "unit"), b"1")
        finish(work, key="new")
        raise RuntimeError("in the middle")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.fault
@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_a_write_killed_in_the_middle_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "file.parquet"
    storage.write_bytes(str(target), b"old")
    killed = subprocess.run([sys.executable, "-c", DIES, str(target), moment], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert target.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2, "the half that was written lies beside"
    assert storage.list_files(str(tmp_path)) == [str(target)]
    assert storage.list_files(str(tmp_path), ".parquet") == [str(target)]


def test_a_full_disk_leaves_nothing_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "token_hex", lambda length: "half")
    (tmp_path / "a.json.tmp-half").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as met:
        storage.write_json(str(tmp_path / "a.json"), [1])
    assert is_no_space(met.value)
    assert not list(tmp_path.iterdir())


def test_two_that_write_the_same_do_not_share_what_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two machines may have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    opened = []
    partial_of = pafs.LocalFileSystem.open_output_stream

    class Noted:
        type_name = "local"

        def __getattr__(self, name: str) -> object:
            return getattr(pafs.LocalFileSystem(), name)

        def open_output_stream(self, path: str) -> object:
            opened.append(path)
            return partial_of(pafs.LocalFileSystem(), path)

    monkeypatch.setattr(storage, "filesystem", lambda uri: (Noted(), uri))
    for _ in range(2):
        storage.write_bytes(str(tmp_path / "a"), b"whole")
    assert len(set(opened)) == 2


def test_a_write_replaces_what_was_there_and_makes_its_folders(tmp_path: Path) -> None:
    target = str(tmp_path / "a" / "b" / "value.json")
    storage.write_json(target, {"x": 1})
    storage.write_json(target, {"x": 2})
    assert storage.read_json(target) == {"x": 2}
    assert names(tmp_path / "a" / "b") == ["value.json"]


def test_all_but_one_entry_of_a_folder_is_removed(tmp_path: Path) -> None:
    storage.keep_only(str(tmp_path / "nothing"), "b")
    for name in ("a/x", "b/y", "c"):
        storage.write_bytes(str(tmp_path / "all" / name), b"")
    storage.keep_only(str(tmp_path / "all"), "b")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["b"]
    assert (tmp_path / "all/b/y").exists()


@pytest.mark.parametrize("form", ["{}", "file://{}/", "file://{}?x=1/2-3"])
def test_all_but_some_units_of_a_folder_are_removed(tmp_path: Path, form: str) -> None:
    storage.keep_units(form.format(tmp_path / "nothing"), {"b"})
    for name in ("a.parquet", "b.parquet", "a.json"):
        storage.write_bytes(str(tmp_path / "all" / name), b"")
    storage.keep_units(form.format(tmp_path / "all"), {"b"})
    assert names(tmp_path / "all") == ["a.json", "b.parquet"]


def test_an_artefact_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    place = str(tmp_path / "artefact")
    assert storage.read_manifest(place) is None
    storage.write_bytes(storage.join(place, "rows.parquet"), b"")
    assert storage.exists(place)
    assert storage.read_manifest(place) is None
    finish(place, rows={"sessions": 3})
    found = storage.read_manifest(place)
    assert found is not None
    assert (found.stage, found.key, found.rows) == ("s", "k", {"sessions": 3})


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_appears_when_its_block_ends(tmp_path: Path, scheme: str) -> None:
    place = f"{scheme}{tmp_path}/artefact"
    with storage.writing(place) as work:
        storage.write_bytes(storage.join(work, "rows"), b"1")
        finish(work)
        assert not storage.exists(place)
    assert storage.list_files(place) == [f"{place}/manifest.json", f"{place}/rows"]
    assert names(tmp_path) == ["artefact"]


def test_a_new_artefact_takes_nothing_over_from_the_old_one(tmp_path: Path) -> None:
    place = str(tmp_path / "artefact")
    for name in ("first", "second"):
        with storage.writing(place) as work:
            storage.write_bytes(storage.join(work, name), b"")
            finish(work, key=name)
    assert names(tmp_path / "artefact") == ["manifest.json", "second"]


def test_an_error_in_the_block_leaves_the_old_artefact(tmp_path: Path) -> None:
    place = str(tmp_path / "artefact")
    with storage.writing(place) as work:
        finish(work, key="old")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail(place)
    found = storage.read_manifest(place)
    assert found is not None and found.key == "old"


@pytest.mark.parametrize("resume_key", ["k", None])
@pytest.mark.parametrize("store", ["folder", "object store"])
def test_of_two_that_write_an_artefact_at_once_the_first_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, resume_key: str | None
) -> None:
    """What the first has written before the second began is gone: what is left must not be taken for whole."""
    if store == "object store":
        as_object_store(monkeypatch)
    place = str(tmp_path / "artefact")

    def write() -> None:
        with storage.writing(place, resume_key=resume_key) as work:
            storage.write_bytes(storage.join(work, "unit"), b"1")
            if store == "folder" and resume_key is None:
                monkeypatch.setattr(os, "getpid", lambda: 1)
            storage.writing(place, resume_key=resume_key).__enter__()
            finish(work)

    with pytest.raises(ConfigError, match=rf"^{place}: another process has begun to write it; end one of the two"):
        write()
    assert storage.read_manifest(place) is None


def test_a_block_that_writes_no_manifest_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without a manifest"), storage.writing(str(tmp_path / "artefact")):
        pass
    assert not storage.exists(str(tmp_path / "artefact"))


def test_units_under_the_same_key_are_found_again(tmp_path: Path) -> None:
    place = str(tmp_path / "artefact")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail(place, resume_key="k1")
    with storage.writing(place, resume_key="k1") as work:
        assert sorted(map(posixpath.basename, storage.list_files(work))) == ["manifest.json", "unit"]
        finish(work)
    assert names(tmp_path) == ["artefact"]
    assert names(tmp_path / "artefact") == ["manifest.json", "unit"]


@pytest.mark.parametrize("resume_key", ["k2", None])
def test_folders_of_other_keys_and_only_those_are_removed(tmp_path: Path, resume_key: str | None) -> None:
    stale = [".artefact.k1", f".artefact.{os.getpid()}"]
    others = [".other.k1", ".artefact_2.k1", "artefact.k1"]
    for name in [*stale, *others]:
        storage.write_bytes(str(tmp_path / name / "unit"), b"1")
    with storage.writing(str(tmp_path / "artefact"), resume_key=resume_key) as work:
        assert storage.list_files(work) == []
        finish(work)
    assert names(tmp_path) == sorted([*others, "artefact"])


class ObjectStore:
    """A folder as an object store: no renames, and a folder is removed object by object."""

    type_name = "s3"

    def __init__(self, fs: pafs.FileSystem, before_change: Callable[[], None]) -> None:
        self.fs = fs
        self.before_change = before_change

    def __getattr__(self, name: str) -> object:
        return getattr(self.fs, name)

    def open_output_stream(self, path: str) -> object:
        self.before_change()
        self.fs.create_dir(posixpath.dirname(path))
        return self.fs.open_output_stream(path)

    def delete_file(self, path: str) -> None:
        self.before_change()
        self.fs.delete_file(path)

    def delete_dir(self, path: str) -> None:
        files = [file for file in Path(path).rglob("*") if file.is_file()]
        # a store promises no order; this one is the worst for who trusts what is hidden until all else is gone
        for file in sorted(files, key=lambda file: (file.name.startswith("."), file)):
            self.delete_file(str(file))
        self.fs.delete_dir(path)


def as_object_store(monkeypatch: pytest.MonkeyPatch, before_change: Callable[[], None] = lambda: None) -> None:
    real = storage.filesystem
    monkeypatch.setattr(storage, "filesystem", lambda uri: (ObjectStore(real(uri)[0], before_change), real(uri)[1]))


def test_a_folder_that_cannot_be_renamed_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an object store: the old manifest goes first, so that a half-written artefact is not taken for whole."""
    as_object_store(monkeypatch)
    monkeypatch.setattr(storage.pafs, "FileSelector", lambda *args, **kwargs: pytest.fail("nothing to look for"))
    place = str(tmp_path / "artefact")
    finish(place, key="old")
    with storage.writing(place, resume_key="k") as work:
        assert work == place
        assert storage.read_manifest(place) is None
        finish(work, key="new")
    found = storage.read_manifest(place)
    assert found is not None and found.key == "new"


@pytest.mark.parametrize("resume_key", ["k2", None])
@pytest.mark.parametrize("before", ["k1", None])
def test_in_place_nothing_of_another_key_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, resume_key: str | None
) -> None:
    as_object_store(monkeypatch)
    place = str(tmp_path / "artefact")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail(place, resume_key=before)
    with storage.writing(place, resume_key=resume_key) as work:
        assert storage.list_files(work) == []
        storage.write_bytes(storage.join(work, "new"), b"")
        finish(work)
    assert names(tmp_path / "artefact") == ["manifest.json", "new"]


def test_in_place_units_under_the_same_key_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_object_store(monkeypatch)
    place = str(tmp_path / "artefact")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail(place, resume_key="k1")
    with storage.writing(place, resume_key="k1") as work:
        assert storage.list_files(work) == [storage.join(place, "unit")], "and the marker is not among the files"
        finish(work)
    assert names(tmp_path / "artefact") == ["manifest.json", "unit"]


def test_in_place_a_death_between_any_two_changes_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try under k2 dies over what k1 has written, and either key is tried again.

    A unit is two objects: `done/x` says that `data/x` is there.
    """
    left = sys.maxsize

    def dies() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("killed")

    def write(place: str, key: str, units: int) -> None:
        with storage.writing(place, resume_key=key) as work:
            for folder in ("data", "done"):
                for file in storage.list_files(storage.join(work, folder)):
                    assert storage.read_json(file) == key
                    assert storage.exists(storage.join(work, "data", posixpath.basename(file)))
            for unit in range(units):
                for folder in ("data", "done"):
                    storage.write_json(storage.join(work, folder, f"{unit}.json"), key)
            finish(work, key=key)

    as_object_store(monkeypatch, dies)
    for again in ("k1", "k2"):
        deaths = 0
        while True:
            place = str(tmp_path / f"{again}-{deaths}")
            write(place, "k1", 3)
            storage.write_json(storage.join(place, storage.RESUME_KEY), "k1")  # died just before it would have gone
            left = deaths
            try:
                write(place, "k2", 2)
            except RuntimeError:
                pass
            else:
                break
            finally:
                left = sys.maxsize
            whole = storage.read_manifest(place)
            if whole is not None:
                files = [file for file in storage.list_files(place) if not file.endswith(storage.MANIFEST)]
                assert len(files) == {"k1": 6, "k2": 4}[whole.key]
                assert {storage.read_json(file) for file in files} == {whole.key}
            write(place, again, 2)
            deaths += 1
        assert deaths > 10, "one a change: what goes, the marker, the units, the manifest"


@pytest.mark.parametrize(
    "name", ["a b", "100%", "a%20b", "a%2Fb", "é", "what?", "a#b", "a;b", "a:b+c@d", "dt=2026-01-01", "[x]", '"', "~"]
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_name_is_kept_whatever_it_holds(tmp_path: Path, scheme: str, name: str) -> None:
    root = f"{scheme}{tmp_path}"
    folder = storage.join(root, name)
    storage.write_bytes(storage.join(folder, name), b"1")
    assert names(tmp_path) == [name] and names(tmp_path / name) == [name]
    (file,) = storage.list_files(folder)
    assert storage.exists(file) and file == storage.join(root, name, name)
    assert storage.pure_path(file).parts[-2:] == (name, name)
    assert storage.pure_path(file).relative_to(storage.pure_path(root)).as_posix() == f"{name}/{name}"
    with storage.writing(folder) as work:
        finish(work)
        assert storage.pure_path(work).parent == storage.pure_path(root)
    assert names(tmp_path / name) == ["manifest.json"]
    storage.keep_only(root, "nothing")
    assert names(tmp_path) == []


@pytest.mark.parametrize("form", ["{}/", "file://{}/", "file://{}?x=1/2", "file://{}/?x=1"])
def test_a_folder_is_found_under_every_form_of_its_name(tmp_path: Path, form: str) -> None:
    """A slash at its end, or a query, which stays behind the name that a file adds."""
    place = form.format(tmp_path / "log")
    with storage.writing(place) as work:
        storage.write_table(storage.join(work, "dt=1", "a.parquet"), pa.table({"x": [1]}))
        finish(work)
    found = storage.list_files(place)
    assert [storage.filesystem(file)[1] for file in found] == [
        str(tmp_path / "log" / name) for name in ("dt=1/a.parquet", "manifest.json")
    ]
    assert storage.read_table(place).to_pydict() == {"x": [1], "dt": ["1"]}
    assert {file.partition("?")[2] for file in found} == {place.partition("?")[2]}
    assert names(tmp_path) == ["log"]


def test_names_are_added_before_the_query_of_a_uri() -> None:
    server = "scheme=http&endpoint_override=127.0.0.1:9000"
    assert storage.join(f"s3://runs/demo/?{server}", "a b", "c") == f"s3://runs/demo/a%20b/c?{server}"
    assert storage.join("hdfs://host:8020/runs", "dt=1", "x") == "hdfs://host:8020/runs/dt=1/x"
    assert storage.join("what?/runs", "x") == "what?/runs/x", "a path has no query"
    assert storage.pure_path(f"s3://runs/a%20b/x.parquet?{server}").stem == "x"


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(-9, 9) | st.none(), min_size=1, max_size=5),
    texts=st.lists(st.lists(st.text(max_size=3), max_size=3), min_size=1, max_size=5),
)
def test_a_table_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int | None], texts: list[list[str]]
) -> None:
    rows = min(len(numbers), len(texts))
    columns = {"number": pa.array(numbers[:rows], pa.int32()), "texts": pa.array(texts[:rows], pa.list_(pa.string()))}
    place = str(tmp_path_factory.mktemp("table") / "a.parquet")
    storage.write_table(place, pa.table(columns))
    back = storage.read_table(place)
    assert back.equals(pa.table(columns))
    assert storage.read_table(place, ["texts"]).column_names == ["texts"]
    kept = [n for n in numbers[:rows] if n is not None and n > 0]
    assert storage.read_table(place, filters=pc.field("number") > 0)["number"].to_pylist() == kept


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_comes_back_in_the_order_of_names_with_its_partitions(tmp_path: Path, scheme: str) -> None:
    # below a folder that looks like a partition and is none of the table's
    root = f"{scheme}{tmp_path}/seed=1/sessions"
    expected = []
    for day in ("2026-01-02", "2026-01-10"):
        for region in ("01", "SG"):
            for part in range(2):
                ids = [f"{day}/{region}/{part}/{row}" for row in range(2)]
                place = storage.join(root, f"dt={day}", f"region={region}", f"part-{part:05d}.parquet")
                storage.write_table(place, pa.table({"id": ids}))
                expected += [{"id": i, "dt": day, "region": region} for i in ids]
    storage.write_bytes(storage.join(root, "manifest.json"), b"{}")
    storage.write_bytes(storage.join(root, "dt=2026-01-02", "region=SG", "x.tmp-1.parquet"), b"half")
    back = storage.read_table(root)
    assert back.to_pylist() == expected
    assert back.schema.field("region").type == pa.string()
    chosen = storage.read_table(root, ["id"], filters=pc.field("region") == "01")
    assert chosen.to_pylist() == [{"id": row["id"]} for row in expected if row["region"] == "01"]


def test_a_region_of_digits_stays_text(tmp_path: Path) -> None:
    storage.write_table(str(tmp_path / "region=07" / "a.parquet"), pa.table({"x": [1]}))
    assert storage.read_table(str(tmp_path)).to_pylist() == [{"x": 1, "region": "07"}]


def test_a_folder_without_partitions_has_its_own_columns(tmp_path: Path) -> None:
    for name in ("b", "a"):
        storage.write_table(str(tmp_path / f"{name}.parquet"), pa.table({"x": [name]}))
    assert storage.read_table(str(tmp_path)).to_pydict() == {"x": ["a", "b"]}


def test_deleting_what_is_absent_is_fine(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "file"), b"")
    storage.delete(str(tmp_path / "folder" / "file"))
    storage.delete(str(tmp_path / "folder" / "file"))
    storage.delete(str(tmp_path / "folder"))
    assert names(tmp_path) == []
    assert storage.list_files(str(tmp_path / "folder")) == []


def test_an_unknown_scheme_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere://x"):
        storage.exists("nowhere://x")


@given(parts=st.lists(JSON, min_size=1, max_size=4), other=JSON, data=st.data())
def test_content_key_changes_with_every_part(parts: list, other: object, data: st.DataObject) -> None:
    key = storage.content_key(*parts)
    assert len(key) == 16 and int(key, 16) >= 0
    place = data.draw(st.integers(0, len(parts) - 1))
    changed = [*parts[:place], other, *parts[place + 1 :]]
    assert (storage.content_key(*changed) == key) == _same(parts[place], other)
    assert storage.content_key(*parts, other) != key
    assert storage.content_key(parts) != key


def test_content_key_is_a_constant_of_its_input() -> None:
    assert storage.content_key({"b": 1, "a": [2]}) == storage.content_key({"a": [2], "b": 1}) == "93459bde8648786a"
    assert storage.content_key("ab", "c") != storage.content_key("a", "bc")
    assert storage.content_key(["s1"], ["text"]) != storage.content_key(["s1", "text"], [])


def _same(a: object, b: object) -> bool:
    """Equality of JSON values, in which true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return a == b


def test_a_death_while_an_artefact_is_removed_leaves_none_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = 0

    def dies() -> None:
        nonlocal changes
        changes += 1
        if changes == 2:
            raise RuntimeError("dead")

    place = str(tmp_path / "artefact")
    with storage.writing(place) as work:
        storage.write_bytes(storage.join(work, "a unit"), b"")  # a store may go by names
        finish(work)
    as_object_store(monkeypatch, dies)
    with pytest.raises(RuntimeError, match="dead"):
        storage.delete(place)
    assert storage.read_manifest(place) is None
