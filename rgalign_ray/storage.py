"""Run directories on any filesystem URI: artefacts written whole or not at all.

An artefact is a folder with a `manifest.json`, written last. A folder without one does not exist for
any reader. On filesystems that rename (file, hdfs) the folder also appears in one move; on object
stores the manifest, which is written last, is what makes it appear.

A URI may carry a query (`s3://bucket/log?endpoint_override=…`), and holds names percent-encoded, where Arrow
gives a path without the one and with the names as they are. So no URI is cut out of another by a path's
length: `join` and `pure_path` are the two ways between names and URIs.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from secrets import token_hex
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from rgalign_ray.errors import ConfigError, DataError, is_no_space

MANIFEST = "manifest.json"
RESUME_KEY = ".tmp-resume-key"
OWNER = ".tmp-owner"
"""Beside the units of an artefact that is in work where it lies, under its `resume_key`; named as partial writes are,
which nothing lists."""
REQUESTS_AT_ONCE = 32
PATH_CHARACTERS = "/=:@!$&'()*+,;"
"""Stand in the path of a URI as they are, beside letters, digits and -._~ (RFC 3986); all else is percent-encoded."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `uri` (file path, file://, s3://, gs://, hdfs://) and the path inside it.

    Raises:
        DataError: for a scheme that has none, and for a URI with a key, which tables, logs and manifests would repeat.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), _absolute(uri)
    if "@" in urlsplit(uri).netloc:
        raise DataError(f"{uri.rpartition('@')[2]}: the address holds a key; keys belong in the environment.")
    try:
        return pafs.FileSystem.from_uri(uri)
    except pa.ArrowException as error:
        raise DataError(f"{uri}: no filesystem for this URI ({error}).") from None


def _absolute(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _split(uri: str) -> tuple[str, str]:
    """A URI and its query; a file path has none."""
    if "://" not in uri:
        return uri, ""
    place, mark, query = uri.partition("?")
    return place, mark + query


def join(uri: str, *parts: str) -> str:
    """`uri` extended by path parts, which are names as the filesystem has them: a URI holds them percent-encoded,
    before its query.
    """
    place, query = _split(uri)
    if "://" in uri:
        parts = tuple(quote(part, safe=PATH_CHARACTERS) for part in parts)
    return posixpath.join(place, *parts) + query


def pure_path(uri: str) -> PurePosixPath:
    """For the names in `uri`, as the filesystem has them: its own, those of its folders, and those below another URI.

    Nothing is opened by it.
    """
    return PurePosixPath(unquote(_split(uri)[0]) if "://" in uri else _absolute(uri))


def content_key(*parts: Any) -> str:
    """A hash of JSON-able values that changes when, and only when, one of them does (16 hex digits)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Manifest(BaseModel):
    """What an artefact is: written beside it, last, and read before anything else of it."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    key: str
    """Hash of the stage's name, its part of the configuration and its inputs' keys."""
    inputs: dict[str, str] = {}
    rows: dict[str, int] = {}
    figures: dict[str, Any] = {}
    """What the stage measured, reproducible from its inputs alone."""
    seconds: float = 0.0
    """Wall time of the stage. It and the next are what another run will not repeat."""
    peak_memory_mb: float = 0.0
    """Most memory that the driver and its Ray processes held at once, shared pages counted once."""


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def read_json(uri: str) -> Any:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return json.loads(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Writes `data` beside its target and renames it: a reader sees the old file or the new one.

    An object store shows an object once it is whole, and is written in place.
    """
    fs, path = filesystem(uri)
    if not _renames(fs):
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    fs.create_dir(posixpath.dirname(path), recursive=True)
    partial = f"{path}.tmp-{token_hex(8)}"  # each its own, where processes of two machines write the same
    try:
        with fs.open_output_stream(partial) as stream:
            stream.write(data)
        fs.move(partial, path)
    except OSError:  # a full disk, say: what is there of it would only take more room
        with suppress(OSError):
            fs.delete_file(partial)
        raise


def _renames(fs: pafs.FileSystem) -> bool:
    """Whether a filesystem moves a file or a folder in one step."""
    return fs.type_name in ("local", "hdfs")


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def write_table(uri: str, table: pa.Table) -> None:
    """One Parquet file, written whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str, columns: list[str] | None = None, filters: ds.Expression | None = None) -> pa.Table:
    """A Parquet file, or all Parquet files of a folder in the order of their names; hive partitions become strings."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.Directory:
        return pq.read_table(path, filesystem=fs, columns=columns, filters=filters)
    files = list_paths(fs, path, ".parquet")
    folders = posixpath.dirname(files[0][len(path) :]).split("/") if files else []
    names = [folder.partition("=")[0] for folder in folders if "=" in folder]
    # typed, since pyarrow would take a region "07" for the number 7
    partitions = ds.partitioning(pa.schema([(name, pa.string()) for name in names]), flavor="hive")
    dataset = ds.dataset(files, filesystem=fs, format="parquet", partitioning=partitions, partition_base_dir=path)
    return dataset.to_table(columns=columns, filter=filters)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Full URIs of the files under a folder, sorted by name; partial writes are not listed."""
    fs, path = filesystem(uri)
    return [join(_absolute(uri), file[len(path) :].lstrip("/")) for file in list_paths(fs, path, suffix)]


def list_paths(fs: pafs.FileSystem, path: str, suffix: str = "") -> list[str]:
    """`list_files` for a folder of a filesystem: paths inside it."""
    return [info.path for info in list_infos(fs, path, suffix)]


def list_infos(fs: pafs.FileSystem, path: str, suffix: str = "") -> list[pafs.FileInfo]:
    """Likewise, with their sizes, which the listing tells anyway."""
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == pafs.FileType.File and info.path.endswith(suffix)]
    return sorted((info for info in files if ".tmp-" not in info.base_name), key=lambda info: info.path)


def stamp(uris: Sequence[str]) -> str:
    """A hash of files' names, sizes and times of their last change."""

    def ask(uri: str) -> pafs.FileInfo:
        fs, path = filesystem(uri)
        return fs.get_file_info(path)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:  # an object store answers each in some ten milliseconds
        infos = list(pool.map(ask, uris))
    return content_key([(uri, info.size, info.mtime_ns) for uri, info in zip(uris, infos, strict=True)])


def delete(uri: str) -> None:
    """Removes a file or a folder; absent is fine.

    An artefact's manifest goes first, so that a death on the way leaves nothing that is taken for whole.
    """
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        delete(join(uri, MANIFEST))
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def keep_only(uri: str, name: str) -> None:
    """Removes what lies in a folder, but for one entry; absent is fine."""
    for entry in entries(uri):
        if entry != name:
            delete(join(uri, entry))


def keep_units(uri: str, keys: Container[str]) -> None:
    """Removes a folder's Parquet files that are named after none of the keys; absent is fine."""
    for file in list_files(uri, ".parquet"):
        if pure_path(file).stem not in keys:
            delete(file)


def entries(uri: str) -> list[str]:
    """Names of the files and folders that lie in a folder, sorted; none where it is absent."""
    fs, path = filesystem(uri)
    return sorted(posixpath.basename(i.path) for i in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)))


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of an artefact, or None where the artefact is absent or incomplete."""
    target = join(uri, MANIFEST)
    if not exists(target):
        return None
    return Manifest.model_validate(read_json(target))


@contextmanager
def writable(uri: str, setting: str) -> Iterator[None]:
    """Around the first that is written below `uri`, which `setting` names.

    Raises:
        ConfigError: in place of an error of the filesystem, but for a full disk, which is none of the setting's.
    """
    try:
        yield
    except OSError as error:
        if is_no_space(error):
            raise
        raise ConfigError(f"{setting}: {uri} cannot be written ({' '.join(str(error).split())})") from None


@contextmanager
def writing(uri: str, *, resume_key: str | None = None) -> Iterator[str]:
    """A folder to write an artefact into; it becomes `uri` when the block ends without an error.

    With `resume_key` the units of a killed process are found again by the next under the same key, and by no other:
    the working folder carries the key in its name, and folders of other keys are removed. The block must write the
    manifest, last. Where folders cannot be renamed (object stores) the block works in `uri` itself, which is emptied
    unless it holds units of that very key; the manifest alone marks the artefact as complete.

    Raises:
        ConfigError: when another process has begun to write the same artefact meanwhile.
    """
    fs, path = filesystem(uri)
    if not _renames(fs):
        with _in_place(uri, resume_key), _alone(uri, uri):
            yield uri
        return
    parent, name = posixpath.split(path)
    hidden = f".{name}.{resume_key or os.getpid()}"
    work = posixpath.join(parent, hidden)
    fs.create_dir(parent, recursive=True)
    for info in fs.get_file_info(pafs.FileSelector(parent)):
        stale = info.path != work or resume_key is None
        if posixpath.basename(info.path).startswith(f".{name}.") and stale:
            fs.delete_dir(info.path)
    fs.create_dir(work, recursive=True)
    place, query = _split(_absolute(uri))
    work_uri = join(posixpath.dirname(place.rstrip("/")) + query, hidden)
    with _alone(uri, work_uri):
        yield work_uri
    assert read_manifest(work_uri) is not None, f"{uri}: written without a manifest"
    delete(uri)
    fs.move(work, path)


@contextmanager
def _alone(uri: str, work_uri: str) -> Iterator[None]:
    """Sees to it that what the block writes is whole: another process that begins empties the folder first."""
    place, owner = join(work_uri, OWNER), token_hex(8)
    write_json(place, owner)
    yield
    if not exists(place) or read_json(place) != owner:
        delete(join(work_uri, MANIFEST))
        raise ConfigError(f"{uri}: another process has begun to write it; end one of the two.")
    delete(place)


@contextmanager
def _in_place(uri: str, resume_key: str | None) -> Iterator[None]:
    """Empties `uri`, but for units under `resume_key`, before the block and leaves a marker there until its end.

    The order makes a death at any point safe. The manifest goes first, so that no reader takes for whole what is being
    removed; the old marker before what it vouches for, so that half of it is not resumed; and a new one comes before
    any unit. A marker that is left beside a manifest vouches for units of that manifest's key, all of them there.
    """
    marker = join(uri, RESUME_KEY)
    delete(join(uri, MANIFEST))
    if resume_key is None or not exists(marker) or read_json(marker) != resume_key:
        delete(marker)
        delete(uri)
        if resume_key is not None:
            write_json(marker, resume_key)
    yield
    if resume_key is not None:
        delete(marker)
