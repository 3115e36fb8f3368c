"""A rollout worker: samples N latent queries for each session of a work unit and writes them down."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa

from rgalign_ray import config, schema, storage
from rgalign_ray.logs.prompts import neutral
from rgalign_ray.reasoner.engine import Engine, EngineSpec, Group, Prompts, Sample, sample_seed
from rgalign_ray.reasoner.teachers import TeacherSpec
from rgalign_ray.reward.functions import fault

EMBEDDINGS = "embeddings"
"""Folder of the vectors of units that were sampled."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """The shared parts of every prompt, and the version of the template they come from."""

    prefix: str
    suffix: str
    version: str

    def prompts(self, texts: list[str]) -> Prompts:
        return Prompts(self.prefix, texts, self.suffix)


@dataclass(frozen=True, slots=True)
class Proposed:
    """A query that a teacher wrote for a session, and how."""

    source: str
    query: str | None
    """None: the teacher was asked no more."""
    finish: str
    prompt_version: str
    temperature: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Sessions that are sampled together: a unit fixes its batch and padding, hence its floats."""

    session_ids: list[str]
    texts: list[str]
    proposed: list[list[Proposed]] | None = None
    """What teachers wrote for each session, the same number for all."""
    part: str = "0"
    """Of the round's sessions; it leads the key, so that a part's units are found by the names of their files."""

    def singly(self) -> list[Unit]:
        """The same sessions, a unit each."""
        proposed = [None] * len(self.texts) if self.proposed is None else [[row] for row in self.proposed]
        rows = zip(self.session_ids, self.texts, proposed, strict=True)
        return [Unit([session], [text], row, self.part) for session, text, row in rows]

    def key(self, *context: object) -> str:
        proposed = [[asdict(one) for one in row] for row in self.proposed or []]
        content = storage.content_key(self.session_ids, self.texts, proposed, [str(c) for c in context])
        return f"{self.part}-{content}"


class RolloutWorker:
    """Samples units with one engine. A plain class; `pool.py` makes it an actor.

    Args:
        engine: how to start the engine.
        instruction: the shared parts of the prompts.
        settings: N, temperature, top-p and lengths.
        run_seed: seed of the run; with round, session and sample it makes the seed of a sample.
        round_: the round r.
        out_uri: folder that receives `rollouts/<key>.parquet` and `embeddings/<key>.parquet`.
    """

    TABLE = "rollouts"

    def __init__(
        self,
        engine: EngineSpec,
        instruction: Instruction,
        settings: config.Rollout,
        run_seed: int,
        round_: int,
        out_uri: str,
    ) -> None:
        self.engine = engine.start()
        self.instruction = instruction
        self.settings = settings
        self.run_seed = run_seed
        self.round = round_
        self.out_uri = out_uri

    def run(self, unit: Unit, key: str) -> int:
        """Samples one unit and writes its two tables; returns the number of completion tokens.

        Embeddings are written first, so a rollouts file marks the whole unit as done.
        """
        seeds = [
            [sample_seed(self.run_seed, self.round, session, sample) for sample in range(self.settings.n)]
            for session in unit.session_ids
        ]
        groups = self.engine.sample(self.instruction.prompts(unit.texts), seeds, self.settings)
        if unit.proposed is not None:
            groups = self._with_proposals(groups, unit.texts, unit.proposed)
        embeddings = embedding_table(unit.session_ids, groups, self.engine)
        storage.write_table(storage.join(self.out_uri, EMBEDDINGS, f"{key}.parquet"), embeddings)
        rollouts = self._rollout_table(unit, groups)
        storage.write_table(storage.join(self.out_uri, self.TABLE, f"{key}.parquet"), rollouts)
        return sum(len(sample.completion_ids) for group in groups for sample in group.samples)

    def _with_proposals(self, groups: list[Group], texts: list[str], proposed: list[list[Proposed]]) -> list[Group]:
        """The groups with teachers' queries behind the policy's own, as the policy reads them."""
        flat = [(row, one) for row, ones in enumerate(proposed) for one in ones]
        there = [(row, neutral(one.query)) for row, one in flat if one.query]
        read = iter(
            self.engine.read(self.instruction.prompts([texts[row] for row, _ in there]), [query for _, query in there])
            if there
            else []
        )
        nothing = np.zeros(self.engine.hidden_size, np.float16)
        samples: list[list[Sample]] = [list(group.samples) for group in groups]
        for row, one in flat:
            sample = next(read) if one.query else Sample("", [], [], one.finish, 0, nothing)
            long = one.finish == "length" or len(sample.completion_ids) > self.settings.max_new_tokens
            samples[row].append(replace(sample, finish="length" if long else "stop"))
        return [replace(group, samples=own) for group, own in zip(groups, samples, strict=True)]

    def _rollout_table(self, unit: Unit, groups: list[Group]) -> pa.Table:
        own = Proposed("policy", "", "", self.instruction.version, self.settings.temperature)
        rows = []
        for number, (session, group) in enumerate(zip(unit.session_ids, groups, strict=True)):
            origins = [own] * self.settings.n + (unit.proposed[number] if unit.proposed else [])
            for place, (sample, origin) in enumerate(zip(group.samples, origins, strict=True)):
                rows.append(
                    {
                        "session_id": session,
                        "sample": place,
                        "source": origin.source,
                        "prompt_version": origin.prompt_version,
                        "temperature": origin.temperature,
                        "query": sample.query,
                        "prompt_ids": group.prompt_ids,
                        "completion_ids": sample.completion_ids,
                        "logprobs": sample.logprobs,
                        "finish": sample.finish,
                        "fault": "not_asked" if origin.query is None else fault(sample),
                        "seed": sample.seed,
                        "reasoner_version": self.engine.version,
                    }
                )
        return pa.Table.from_pylist(rows, schema=schema.ROLLOUTS)


class ProposalWorker:
    """Asks one teacher for queries, unit by unit. A plain class; `pool.py` makes it an actor.

    Args:
        teacher: how to start it.
        instruction: the shared parts of its prompts.
        run_seed, round_: as in `RolloutWorker`.
        out_uri: folder that receives `proposals/<key>.parquet`.
    """

    TABLE = "proposals"

    def __init__(
        self, teacher: TeacherSpec, instruction: Instruction, run_seed: int, round_: int, out_uri: str
    ) -> None:
        self.teacher, self.proposer = teacher.teacher, teacher.start()
        self.instruction = instruction
        self.run_seed, self.round, self.out_uri = run_seed, round_, out_uri

    def run(self, unit: Unit, key: str) -> int:
        """Writes one unit's proposals, null for what the teacher was asked no more; returns how many there are."""
        seeds = [
            [
                sample_seed(self.run_seed, self.round, f"{self.teacher.name}\x1f{session}", n)
                for n in range(self.teacher.n)
            ]
            for session in unit.session_ids
        ]
        proposals = self.proposer.propose(self.instruction.prompts(unit.texts), seeds)
        rows = [
            {"session_id": session, "query": one.query if one else None, "finish": one.finish if one else None}
            for session, row in zip(unit.session_ids, proposals, strict=True)
            for one in row
        ]
        table = pa.Table.from_pylist(rows, schema=schema.PROPOSALS)
        storage.write_table(storage.join(self.out_uri, self.TABLE, f"{key}.parquet"), table)
        return len(table) - table["query"].null_count


def embedding_table(session_ids: list[str], groups: list[Group], engine: Engine) -> pa.Table:
    """e(x) of every session (sample -1) and e(x,q) of every sample, as `schema.embeddings`."""
    ids, readouts, samples, queries, vectors = [], [], [], [], []
    for session, group in zip(session_ids, groups, strict=True):
        ids += [session] * (1 + len(group.samples))
        readouts += ["prompt"] + ["query"] * len(group.samples)
        samples += [-1, *range(len(group.samples))]
        queries += [None, *(sample.query for sample in group.samples)]
        vectors += [group.embedding, *(sample.embedding for sample in group.samples)]
    return vectors_table(ids, readouts, samples, queries, np.stack(vectors), engine.version)


def vectors_table(
    ids: list[str],
    readouts: list[str],
    samples: list[int],
    queries: list[str | None],
    vectors: np.ndarray,
    version: str,
) -> pa.Table:
    """An embeddings table from parallel lists and float16 vectors [len(ids), H]."""
    dim = vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float16).reshape(-1))
    return pa.table(
        [
            pa.array(ids, pa.string()),
            pa.array(readouts, pa.string()),
            pa.array(samples, pa.int32()),
            pa.array(queries, pa.string()),
            pa.array([version] * len(ids), pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, dim),
        ],
        schema=schema.embeddings(dim),
    )
