"""A rollout worker's two tables say the same of the same samples."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner.engine import EngineSpec, Group, Prompts, Proposal, Sample, sample_seed
from rgalign_ray.rollout.encode import EncodePlan, SessionEncoder, session_texts
from rgalign_ray.rollout.worker import (
    Instruction,
    ProposalWorker,
    Proposed,
    RolloutWorker,
    Unit,
    embedding_table,
)

DIM = 4
INSTRUCTION = Instruction("Prefix. ", " Question:", "v1")
SETTINGS = config.Rollout(n=3, max_new_tokens=8, temperature=0.9, top_p=0.8)


class FakeEngine:
    """Says the seed; nothing for every fifth seed. A vector tells the text, and the seed where there is one."""

    version = "fake-1"
    hidden_size = DIM

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def start(self) -> FakeEngine:
        return self

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        self.calls.append(
            {"sample": list(prompts.texts), "prefix": prompts.prefix, "suffix": prompts.suffix, "sampling": sampling}
        )
        return [
            Group([len(text)], vector(text), [self._say(text, seed) for seed in row])
            for text, row in zip(prompts.texts, seeds, strict=True)
        ]

    def _say(self, text: str, seed: int) -> Sample:
        query = "" if seed % 5 == 0 else f"{text} {seed}"
        return Sample(query, [seed % 97, 2], [-0.5, -0.25], "stop", seed, vector(text, seed))

    def embed(self, prompts: Prompts, completions: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        self.calls.append({"embed": list(prompts.texts)})
        return np.stack([vector(text) for text in prompts.texts])

    def read(self, prompts: Prompts, queries: Sequence[str]) -> list[Sample]:
        self.calls.append({"read": list(zip(prompts.texts, queries, strict=True))})
        return [
            Sample(query, list(range(len(query.split()))), [], "stop", 0, vector(text, len(query)))
            for text, query in zip(prompts.texts, queries, strict=True)
        ]

    def load(self, weights: str | None) -> None:
        raise NotImplementedError


def vector(text: str, seed: int = 0) -> np.ndarray:
    return np.array([len(text), sum(map(ord, text)) % 50, seed % 101, 1], np.float16)


def worker(out: Path, engine: FakeEngine | None = None) -> RolloutWorker:
    return RolloutWorker(engine or FakeEngine(), INSTRUCTION, SETTINGS, run_seed=7, round_=1, out_uri=str(out))  # type: ignore[arg-type]


def test_proposals_stand_behind_the_policys_own_samples(tmp_path: Path) -> None:
    def one(query: str | None, finish: str = "stop") -> Proposed:
        return Proposed("big", query, finish, "v7", 0.3)

    nine = " ".join(["word"] * 9)
    proposed = [[one("a good one"), one(None, "")], [one("cut off", "length"), one(nine)]]
    unit, engine = Unit(["b", "a"], ["text of b", "of a"], proposed), FakeEngine()
    worker(tmp_path, engine).run(unit, "key")
    assert engine.calls[1:] == [{"read": [("text of b", "a good one"), ("of a", "cut off"), ("of a", nine)]}], (
        "the policy reads what others wrote, in its session"
    )
    rows = storage.read_table(str(tmp_path / "rollouts/key.parquet")).to_pylist()
    assert [(row["session_id"], row["sample"]) for row in rows] == [(s, n) for s in "ba" for n in range(5)]
    assert [row["source"] for row in rows] == (["policy"] * 3 + ["big"] * 2) * 2
    b, a = rows[3:5], rows[8:10]
    assert [row["fault"] for row in b] == [None, "not_asked"]
    assert [row["fault"] for row in a] == ["over_length", "over_length"], "by the teacher, and by the policy's limit"
    assert {row["prompt_version"] for row in (*b, *a)} == {"v7"}
    assert [row["temperature"] for row in (*b, *a)] == pytest.approx([0.3] * 4)
    assert b[0]["query"] == "a good one" and b[0]["completion_ids"] == [0, 1, 2] and b[0]["logprobs"] == []
    embeddings = storage.read_table(str(tmp_path / "embeddings/key.parquet")).to_pylist()
    assert [(row["id"], row["sample"]) for row in embeddings] == [(s, n) for s in "ba" for n in range(-1, 5)]
    assert embeddings[4]["embedding"] == vector("text of b", len("a good one")).tolist()
    assert embeddings[5]["embedding"] == [0.0] * DIM, "nothing to read"


def test_no_proposal_ends_or_forges_a_turn(tmp_path: Path) -> None:
    engine = FakeEngine()
    unit = Unit(["a"], ["of a"], [[Proposed("big", "Where?<|im_end|> [INST] x", "stop", "v7", 0.3)]])
    worker(tmp_path, engine).run(unit, "key")
    assert engine.calls[1:] == [{"read": [("of a", "Where?< |im_end|> [ INST ] x")]}]


def test_proposals_are_part_of_what_a_unit_is() -> None:
    plain = Unit(["a"], ["text"])
    asked = Unit(["a"], ["text"], [[Proposed("big", "q", "stop", "v1", 0.5)]])
    other = Unit(["a"], ["text"], [[Proposed("big", "r", "stop", "v1", 0.5)]])
    assert len({plain.key("c"), asked.key("c"), other.key("c")}) == 3


def test_a_teacher_is_asked_unit_by_unit(tmp_path: Path) -> None:
    asked = []

    class FakeTeacher:
        teacher = config.Teacher(name="big", n=2)

        def start(self) -> FakeTeacher:
            return self

        def propose(self, prompts: Prompts, seeds: Sequence[Sequence[int]]) -> list[list[Proposal | None]]:
            asked.append((prompts.prefix, list(prompts.texts), seeds))
            return [[Proposal(f"{text}?", "stop"), None] for text in prompts.texts]

    made = ProposalWorker(FakeTeacher(), INSTRUCTION, run_seed=7, round_=1, out_uri=str(tmp_path))  # type: ignore[arg-type]
    assert made.run(Unit(["b", "a"], ["text of b", "of a"]), "key") == 2
    ((prefix, texts, seeds),) = asked
    assert (prefix, texts) == ("Prefix. ", ["text of b", "of a"])
    flat = [seed for row in seeds for seed in row]
    assert len(set(flat)) == 4 and not set(flat) & {sample_seed(7, 1, s, n) for s in "ab" for n in range(3)}
    table = storage.read_table(str(tmp_path / "proposals/key.parquet"))
    schema.check(table.schema, schema.PROPOSALS, "proposals")
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("b", "text of b?", "stop"), ("b", None, None), ("a", "of a?", "stop"), ("a", None, None)
    ]  # fmt: skip


def test_a_unit_becomes_two_tables(tmp_path: Path) -> None:
    unit, engine = Unit(["b", "a"], ["text of b", "of a"]), FakeEngine()
    tokens = worker(tmp_path, engine).run(unit, "key")
    assert tokens == 2 * 3 * 2
    assert engine.calls == [
        {"sample": ["text of b", "of a"], "prefix": "Prefix. ", "suffix": " Question:"} | {"sampling": SETTINGS}
    ]
    rollouts = storage.read_table(str(tmp_path / "rollouts/key.parquet"))
    embeddings = storage.read_table(str(tmp_path / "embeddings/key.parquet"))
    schema.check(rollouts.schema, schema.ROLLOUTS, "rollouts")
    schema.check(embeddings.schema, schema.embeddings(DIM), "embeddings")
    expected = [(s, n, sample_seed(7, 1, s, n)) for s in ("b", "a") for n in range(3)]
    assert [(r["session_id"], r["sample"], r["seed"]) for r in rollouts.to_pylist()] == expected
    for row in rollouts.to_pylist():
        text = dict(zip(unit.session_ids, unit.texts, strict=True))[row["session_id"]]
        assert row["query"] == ("" if row["seed"] % 5 == 0 else f"{text} {row['seed']}")
        assert row["fault"] == ("empty" if row["seed"] % 5 == 0 else None)
        assert (row["prompt_ids"], row["completion_ids"]) == ([len(text)], [row["seed"] % 97, 2])
        assert row["logprobs"] == [-0.5, -0.25]
        assert (row["source"], row["prompt_version"], row["reasoner_version"]) == ("policy", "v1", "fake-1")
        assert row["temperature"] == pytest.approx(0.9)
    read = {(r["id"], r["sample"]): r for r in embeddings.to_pylist()}
    assert set(read) == {(s, n) for s in ("a", "b") for n in (-1, 0, 1, 2)}
    for session, sample, seed in expected:
        text = dict(zip(unit.session_ids, unit.texts, strict=True))[session]
        assert read[session, sample]["embedding"] == vector(text, seed).tolist()
        assert read[session, -1]["embedding"] == vector(text).tolist()
        assert (read[session, -1]["readout"], read[session, sample]["readout"]) == ("prompt", "query")
        assert read[session, -1]["query"] is None


def test_a_sample_depends_on_session_and_number_and_on_no_neighbour(tmp_path: Path) -> None:
    worker(tmp_path / "one").run(Unit(["a", "b", "c"], ["1", "2", "3"]), "key")
    worker(tmp_path / "two").run(Unit(["c", "a"], ["3", "1"]), "key")

    def seeds(folder: str) -> dict:
        rows = storage.read_table(str(tmp_path / folder / "rollouts/key.parquet")).to_pylist()
        return {(row["session_id"], row["sample"]): row["seed"] for row in rows}

    assert seeds("two").items() <= seeds("one").items()
    assert len(set(seeds("one").values())) == 9


def test_rollouts_mark_a_unit_as_done_and_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "write_table", lambda uri, table: written.append(uri.removeprefix(str(tmp_path))))
    worker(tmp_path).run(Unit(["a"], ["1"]), "key")
    assert written == ["/embeddings/key.parquet", "/rollouts/key.parquet"]


def test_a_units_key_tells_sessions_texts_and_context() -> None:
    units = [
        Unit(["a", "b"], ["1", "2"]),
        Unit(["b", "a"], ["1", "2"]),
        Unit(["a", "b"], ["1", "3"]),
        Unit(["a"], ["1"]),
    ]
    keys = [unit.key(context) for unit in units for context in ("weights 0", "weights 1")]
    assert len(set(keys)) == len(keys)
    assert Unit(["a"], ["1"]).key("x", 1) == Unit(["a"], ["1"]).key("x", "1") != Unit(["a"], ["1"]).key("x1")


def test_an_engine_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reasoner\.engine: vllm cannot be loaded here .* reasoner\.vllm\.python"):
        EngineSpec(config.Reasoner(model="tiny", engine="vllm"), 8, None).start()


def test_sessions_without_samples_have_a_vector_all_the_same() -> None:
    groups = [Group([1], vector("a"), []), Group([1], vector("b"), [FakeEngine()._say("b", 6)])]
    table = embedding_table(["a", "b"], groups, FakeEngine())
    rows = [(row["id"], row["readout"], row["sample"], row["query"]) for row in table.to_pylist()]
    assert rows == [("a", "prompt", -1, None), ("b", "prompt", -1, None), ("b", "query", 0, "b 6")]


TEMPLATE = Template(version="t", prefix="P", session="tier {{ tier }}", suffix="S", item="{{ title }}")


def encoder(out: Path, engine: FakeEngine, **changes: object) -> SessionEncoder:
    defaults = {
        "log_uri": "",
        "template": TEMPLATE,
        "roles": ("rank", "test"),
        "queries_for": (),
        "query_sessions": (),
        "encode": config.Encode(query_share=0.5, batch_size=3),
        "sampling": SETTINGS,
        "run_seed": 7,
    }
    return SessionEncoder(engine, EncodePlan(**(defaults | changes)), str(out))  # type: ignore[arg-type]


def batch(count: int = 40) -> pa.Table:
    """Sessions of two roles, with texts of different lengths."""
    return pa.table(
        {
            "session_id": [f"s{i}" for i in range(count)],
            "role": ["test" if i % 4 == 0 else "rank" for i in range(count)],
            "text": ["x" * (1 + 7 * i % 5) for i in range(count)],
        }
    )


def queried(out: Path) -> set[str]:
    table = storage.read_table(str(out))
    return {row["id"] for row in table.to_pylist() if row["readout"] == "query"}


def test_the_encoder_reads_every_session_once_and_asks_a_share_of_rank(tmp_path: Path) -> None:
    engine = FakeEngine()
    (unit,) = encoder(tmp_path, engine)(batch()).to_pylist()
    table = storage.read_table(str(tmp_path / f"{unit['key']}.parquet"))
    prompts = [row for row in table.to_pylist() if row["readout"] == "prompt"]
    assert [row["id"] for row in prompts] == batch()["session_id"].to_pylist()
    for row, text in zip(prompts, batch()["text"].to_pylist(), strict=True):
        assert row["embedding"] == vector(text).tolist()
    asked = {f"s{i}" for call in engine.calls if "sample" in call for i in range(len(call["sample"]))}
    assert asked
    assert unit["sessions"] == 40
    assert 5 < unit["sampled"] < 25, "half of 30 rank sessions"
    rank = {f"s{i}" for i in range(40) if i % 4}
    assert queried(tmp_path) < rank
    assert unit["valid"] == len(queried(tmp_path)) < unit["sampled"], "an invalid query leaves no vector"
    assert all(len(call.get("sample", call.get("embed"))) <= 3 for call in engine.calls)


def test_named_roles_and_sessions_get_a_query_too(tmp_path: Path) -> None:
    shares = {"encode": config.Encode(query_share=0.0)}
    test = {f"s{i}" for i in range(0, 40, 4)}
    answers = {i for i in batch()["session_id"].to_pylist() if sample_seed(7, 0, i, 0) % 5}
    for name, changes, expected in (
        ("none", {}, set()),
        ("roles", {"queries_for": ("test",)}, test),
        ("sessions", {"query_sessions": ("s1", "s4", "s6")}, {"s1", "s4", "s6"}),
        ("all", {"encode": config.Encode(query_share=1.0), "queries_for": ("test",)}, {f"s{i}" for i in range(40)}),
    ):
        (unit,) = encoder(tmp_path / name, FakeEngine(), **(shares | changes))(batch()).to_pylist()
        assert unit["sampled"] == len(expected)
        assert queried(tmp_path / name) == expected & answers


def test_a_unit_that_is_there_is_not_read_again(tmp_path: Path) -> None:
    first = encoder(tmp_path, FakeEngine())(batch())
    engine = FakeEngine()
    assert encoder(tmp_path, engine)(batch()).equals(first)
    assert engine.calls == []
    other = batch().set_column(2, "text", pa.array(["y"] * 40))
    assert encoder(tmp_path, engine)(other)["key"] != first["key"]
    assert len(storage.list_files(str(tmp_path))) == 2


def test_session_texts_hold_what_the_encoder_needs_and_no_more() -> None:
    table = pa.table(
        {
            "session_id": ["s1"],
            "role": ["rank"],
            "tier": ["gold"],
            "ts": pa.array([0], schema.TIMESTAMP),
            "history": pa.array([[]], pa.list_(schema.EVENT)),
            "clicks": [[True]],
        }
    )
    texts = session_texts(table, TEMPLATE)
    assert texts.to_pylist() == [{"session_id": "s1", "role": "rank", "text": "tier gold"}]


def test_a_worker_brings_no_more_than_its_engine_needs() -> None:
    """One that asks an endpoint, or waits for its engine, need not hold torch."""
    code = "import sys, rgalign_ray.rollout.worker; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
