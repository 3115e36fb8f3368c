"""The encode pass writes the same files whatever happened before."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner.engine import EngineSpec, Prompts
from rgalign_ray.rollout.encode import EncodePlan, encode, encode_items

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

ENGINE = EngineSpec(config.Reasoner(model="tiny", dtype="float32"), 32, None)
TEMPLATE = Template(
    version="t", prefix="What is asked?\n", session="tier {{ tier }}", suffix="\nQuestion:", item="{{ title }}"
)
ROLES = ["rank", "rank", "align_1", "test"]
SESSIONS = 120


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions of three days in files of several sizes, a quarter of which no pass reads."""
    root = tmp_path_factory.mktemp("encode")
    for day, rows in enumerate((range(50), range(50, 57), range(57, SESSIONS)), 1):
        table = pa.table(
            {
                "session_id": [f"s{i}" for i in rows],
                "ts": pa.array([datetime.datetime(2026, 1, day)] * len(rows), schema.TIMESTAMP),
                "tier": ["gold" * (1 + i % 4) for i in rows],
                "history": pa.array([[]] * len(rows), pa.list_(schema.EVENT)),
                "clicks": [[True]] * len(rows),
                "role": [ROLES[i % 4] for i in rows],
            }
        )
        place = root / "sessions" / f"dt=2026-01-{day:02d}" / "region=SG" / "part-00000.parquet"
        storage.write_table(str(place), table)
    return root


@dataclass(frozen=True)
class Troubled:
    """A spec and its engine, which dies or hangs over every prompt; `notes` grows by a byte each time."""

    notes: str
    trouble: str

    version = "troubled"

    def start(self) -> Troubled:
        return self

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> None:
        with Path(self.notes).open("a") as notes:
            notes.write(".")
        if self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def run(
    log: Path, out: Path, workers: int = 1, engine: Any = ENGINE, **changes: object
) -> tuple[dict[str, int], list[int]]:
    """Counts of a pass into `out`, and what it advanced by; `changes` are of `encode`."""
    plan = EncodePlan(
        log_uri=str(log),
        template=TEMPLATE,
        roles=("rank", "test"),
        queries_for=(),
        query_sessions=("s3", "s7"),
        encode=config.Encode(workers=workers, unit_sessions=16, batch_size=8, query_share=0.5, **changes),  # type: ignore[arg-type]
        sampling=config.Rollout(max_new_tokens=12, temperature=1.0),
        run_seed=0,
    )
    steps: list[int] = []
    return encode(plan, engine, str(out), steps.append), steps


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def encoded(ray_cluster: None, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    counts, steps = run(log, out, workers=2)
    assert counts["sessions"] == sum(steps) == 90
    assert len(steps) == len(contents(out)) > 1
    storage.write_json(str(out.parent / "counts.json"), counts)
    return out


def test_every_session_is_read_once_and_some_with_a_query(encoded: Path) -> None:
    counts = storage.read_json(str(encoded.parent / "counts.json"))
    rows = storage.read_table(str(encoded)).to_pylist()
    expected = [f"s{i}" for i in range(SESSIONS) if ROLES[i % 4] != "align_1"]
    assert sorted(row["id"] for row in rows if row["readout"] == "prompt") == sorted(expected)
    queries = [row for row in rows if row["readout"] == "query"]
    assert len(queries) == len({row["id"] for row in queries}) == counts["valid"]
    assert counts["valid"] < counts["sampled"], "the tiny model says much that has no end"
    assert 2 + 15 < counts["sampled"] < 2 + 45, "two by name, and half of sixty"
    test = {f"s{i}" for i in range(3, SESSIONS, 4)} - {"s3", "s7"}
    assert not {row["id"] for row in queries} & test
    assert {row["reasoner_version"] for row in rows} == {"tiny"}


def test_a_vector_is_that_of_the_session_alone(encoded: Path) -> None:
    engine = ENGINE.start()
    rows = {row["id"]: row for row in storage.read_table(str(encoded)).to_pylist() if row["readout"] == "prompt"}
    for number in (0, 7, 60):
        text = f"tier {'gold' * (1 + number % 4)}"
        alone = engine.embed(Prompts(TEMPLATE.prefix, [text], TEMPLATE.suffix))[0]
        np.testing.assert_allclose(rows[f"s{number}"]["embedding"], alone, atol=4e-3)


@pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning")
def test_a_pass_repeats_resumes_and_cleans_up(encoded: Path, log: Path, tmp_path: Path) -> None:
    """Into a half-filled folder: what is there stays untouched, what is missing comes back, what is stale goes."""
    whole = contents(encoded)
    missing = sorted(whole)[::2]
    kept = {name: data for name, data in whole.items() if name not in missing}
    for name, data in kept.items():
        storage.write_bytes(str(tmp_path / name), data)
    storage.write_table(str(tmp_path / "0123456789abcdef.parquet"), pa.table({"of": ["an earlier plan"]}))
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    counts, _ = run(log, tmp_path)
    assert counts == storage.read_json(str(encoded.parent / "counts.json"))
    assert contents(tmp_path) == whole, "one worker or two, resumed or not"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == written


@pytest.mark.fault
def test_an_encoder_that_dies_every_time_ends_the_pass(log: Path, tmp_path: Path) -> None:
    engine = Troubled(str(tmp_path / "notes"), "die")
    with pytest.raises(
        InfrastructureError, match=r"encode: an encoder died more often than encode\.retries = 1 allows"
    ):
        run(log, tmp_path / "out", engine=engine, retries=1, deadline_s=60.0)
    assert (tmp_path / "notes").read_text() == "..", "what it had in hand is tried once more"


@pytest.mark.fault
def test_an_encoder_that_hangs_ends_the_pass_and_leaves_what_it_was_at(log: Path, tmp_path: Path) -> None:
    engine = Troubled(str(tmp_path / "notes"), "hang")
    with pytest.raises(
        InfrastructureError, match=r"nothing was read for 12 s, which is encode\.deadline_s; .*CPUs are"
    ):
        run(log, tmp_path / "out", engine=engine, deadline_s=12.0)
    context = ray.get_runtime_context()
    logs = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    assert [log for log in logs.glob("worker-*.err") if "in _sample" in log.read_text()]


def test_items_are_read_in_their_order_where_a_session_stands(tmp_path: Path) -> None:
    place = str(tmp_path / "items.parquet")
    texts = ["Cancel an order", "Refund", "Speed up"]
    encode_items(ENGINE, ["a", "b", "c"], Prompts("He asks.", texts, "\nQ:"), 2, place)
    table = storage.read_table(place)
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert table["readout"].unique().to_pylist() == ["item"]
    expected = [ENGINE.start().embed(Prompts("He asks.", [text], "\nQ:"))[0] for text in texts]
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=4e-3)
