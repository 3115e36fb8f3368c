"""The encode pass: Ray Data streams sessions through engines, which read e(x) and, for some, e(x,q).

  log (columns pruned, roles pushed down) ──▶ session texts ──▶ encoders (actor pool) ──▶ one file a unit

A unit is a batch of the stream in its fixed order. It is written by the encoder itself under a key of
its content, so that a killed pass redoes only the units in flight, and nothing gathers in the driver.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from rgalign_ray import __version__, config, ray_stacks, storage
from rgalign_ray.errors import InfrastructureError, UserError, first_line
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs import lists, stream
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import EngineSpec, Group, Prompts, Sample, sample_seed
from rgalign_ray.reasoner.sentence_encoder import joined
from rgalign_ray.reward.functions import fault
from rgalign_ray.rollout.worker import Instruction, embedding_table, vectors_table

JUDGING = ("valid", "test")
"""Roles that rankers are judged by; from all others they learn."""
HASHES = 1 << 20
"""Resolution of the hash that decides which sessions that rankers learn from get a query."""


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """What one encode pass reads and how."""

    log_uri: str
    template: Template
    roles: tuple[str, ...]
    queries_for: tuple[str, ...]
    """Roles all of whose sessions get a sampled query."""
    query_sessions: tuple[str, ...]
    """Further sessions that get one."""
    encode: config.Encode
    sampling: config.Sampling
    run_seed: int
    kept_uri: str | None = None
    """Where units are kept for other runs; None keeps none."""
    written_uri: str | None = None
    """Embeddings whose queries are read with the session's text, where an engine writes none itself."""


def session_texts(batch: pa.Table, template: Template, unclicked: bool = True) -> pa.Table:
    """`session_id`, `role` and the session's text; `unclicked` keeps those without a click that rankers learn from."""
    if not unclicked:
        judges = np.isin(batch["role"].to_pylist(), JUDGING)
        batch = batch.filter(pa.array(judges | lists.any_true(batch["clicks"])))
    return pa.table(
        {
            "session_id": batch["session_id"],
            "role": batch["role"],
            "text": pa.array(template.sessions(batch), pa.string()),
        }
    )


class SessionEncoder:
    """Reads batches of session texts with one engine and writes their vectors; a plain class that Ray Data runs.

    A batch holds `session_id`, `role` and `text`; what comes out is a row per unit: its key, its
    sessions, the queries it sampled and those that were valid. An invalid query leaves no vector: its
    session is read without one.
    """

    def __init__(self, engine: EngineSpec, plan: EncodePlan, out_uri: str) -> None:
        self.engine = engine.start()
        template = plan.template
        self.instruction = Instruction(template.prefix, template.suffix, template.version)
        self.plan = plan
        self.out_uri = out_uri
        sampled = (True, False) if plan.kept_uri else ()
        self.kept_context = {with_query: _kept_context(engine, plan, with_query) for with_query in sampled}
        self.written = written_queries(plan.written_uri) if plan.written_uri else {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        with ray_stacks.noted(self.plan.encode.deadline_s, ends=True):  # else it would keep its CPU after the pass
            return self._unit(batch)

    def _unit(self, batch: pa.Table) -> pa.Table:
        ids, texts = batch["session_id"].to_pylist(), batch["text"].to_pylist()
        wants_query = self._wants_query(ids, batch["role"].to_pylist())
        queries = [self.written.get(i) for i in ids]
        key = storage.content_key(ids, texts, wants_query.tolist(), queries, self.engine.version)
        places = [storage.join(self.out_uri, f"{key}.parquet")]
        if self.plan.kept_uri:
            kept = storage.content_key(key, self.kept_context[bool(wants_query.any())])
            places.append(storage.join(self.plan.kept_uri, f"{kept}.parquet"))
        found = [place for place in places if storage.exists(place)]
        if found:
            table = storage.read_table(found[0])
        else:
            table = embedding_table(ids, self._read(ids, texts, wants_query), self.engine)
        for place in places:
            if place not in found:
                storage.write_table(place, table)
        valid = len(table) - table["query"].null_count
        return pa.table({"key": [key], "sessions": [len(ids)], "sampled": [int(wants_query.sum())], "valid": [valid]})

    def _wants_query(self, ids: list[str], roles: list[str]) -> np.ndarray:
        if self.plan.written_uri:
            return np.array([i in self.written for i in ids])
        named = np.isin(roles, self.plan.queries_for) | np.isin(ids, self.plan.query_sessions)
        share = session_keys(ids) % HASHES < self.plan.encode.query_share * HASHES
        return named | (share & ~np.isin(roles, (*JUDGING, "audit")))

    def _read(self, ids: list[str], texts: list[str], wants_query: np.ndarray) -> list[Group]:
        """Groups in the order of `ids`; rows of like length are read together, so that little is padding."""
        groups: list[Group | None] = [None] * len(ids)
        for wanted in (True, False):
            rows = sorted(np.flatnonzero(wants_query == wanted).tolist(), key=lambda row: (len(texts[row]), ids[row]))
            for start in range(0, len(rows), self.plan.encode.batch_size):
                chunk = rows[start : start + self.plan.encode.batch_size]
                prompts = self.instruction.prompts([texts[row] for row in chunk])
                if wanted:
                    read = self._with_query(prompts, [ids[row] for row in chunk])
                else:
                    read = [Group([], vector, []) for vector in self.engine.embed(prompts)]
                for row, group in zip(chunk, read, strict=True):
                    groups[row] = group
        return [group for group in groups if group is not None]

    def _with_query(self, prompts: Prompts, ids: list[str]) -> list[Group]:
        if not self.plan.written_uri:
            return self._sample(prompts, ids)
        queries = [self.written[i] for i in ids]
        own = self.engine.embed(prompts)
        both = self.engine.embed(self.instruction.prompts(joined(queries, prompts.texts)))
        return [
            Group([], e_x, [Sample(query, [], [], "stop", -1, e_xq)])
            for query, e_x, e_xq in zip(queries, own, both, strict=True)
        ]

    def _sample(self, prompts: Prompts, ids: list[str]) -> list[Group]:
        # seeds are the same in every round, so that a query that changes has changed by the reasoner alone
        seeds = [[sample_seed(self.plan.run_seed, 0, session, 0)] for session in ids]
        groups = self.engine.sample(prompts, seeds, self.plan.sampling)
        return [replace(group, samples=[s for s in group.samples if fault(s) is None]) for group in groups]


def _kept_context(engine: EngineSpec, plan: EncodePlan, sampled: bool) -> str:
    """What decides a unit's vectors besides its sessions, which stand in its key; `sampled` where it has queries."""
    sampling = plan.sampling.model_dump(include=set(config.Sampling.model_fields))
    return storage.content_key(
        __version__,
        models.identity(engine.reasoner.model),
        engine.reasoner.model_dump(include={"engine", "dtype", "device", "threads", "pooling", "depth"}),
        engine.max_session_tokens,
        plan.template.key,
        plan.encode.batch_size,
        *((sampling, plan.run_seed) if sampled else ()),
    )


def written_queries(embeddings_uri: str) -> dict[str, str]:
    """The valid latent query of each session that has one."""
    table = storage.read_table(embeddings_uri, columns=["id", "readout", "query"])
    table = table.filter(pc.equal(table["readout"], "query"))
    return dict(zip(table["id"].to_pylist(), table["query"].to_pylist(), strict=True))


def encode(plan: EncodePlan, engine: EngineSpec, out_uri: str, advance: Callable[[int], None]) -> dict[str, int]:
    """Writes the embeddings of every session of `plan.roles` into `out_uri`, a folder of Parquet files.

    Files of an earlier try whose units this pass did not meet are removed.

    Returns:
        counts: sessions, queries sampled, valid queries.

    Raises:
        DataError: when the template fails on a session.
        InfrastructureError: when an encoder died more often than `plan.encode.retries`, or nothing came within
            `plan.encode.deadline_s`.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True  # units must not depend on timing
    context.raise_original_map_exception = True  # the exception that wraps it comes back without its cause
    columns = sorted({*plan.template.columns, "session_id", "role", "clicks"})
    texts = stream.sessions(plan.log_uri, columns=columns, roles=list(plan.roles), block_bytes=1).map_batches(
        session_texts,
        fn_kwargs={"template": plan.template, "unclicked": plan.encode.unclicked},
        batch_format="pyarrow",
        num_cpus=0.25,
    )
    units = by_encoders(texts, SessionEncoder, plan.encode, engine=engine, plan=plan, out_uri=out_uri)
    counts = {"sessions": 0, "sampled": 0, "valid": 0}
    keys = set()
    with as_user_errors("encode", plan.encode):
        for block in units.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in block.to_pylist():
                keys.add(row["key"])
                for name in counts:
                    counts[name] += row[name]
                advance(row["sessions"])
    storage.keep_units(out_uri, keys)
    return counts


def by_encoders(
    sessions: ray.data.Dataset, encoder: type, settings: config.Encode, **arguments: Any
) -> ray.data.Dataset:
    """Sessions through a pool of encoders, so many at once, which may die so often and must come on by a deadline.

    Args:
        encoder: from a unit of sessions to what it makes of them, both as tables; made anew in each worker.
        arguments: of its constructor.
    """
    with warnings.catch_warnings():
        # Of restarts, which have no limit otherwise, Ray Data is told in no other way than the one that it warns of.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        read = sessions.map_batches(
            encoder,
            fn_constructor_kwargs=arguments,
            batch_size=settings.unit_sessions,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=settings.workers, max_tasks_in_flight_per_actor=2),
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            label_selector=settings.node_labels,
            max_restarts=settings.retries,
            max_task_retries=settings.retries,
        )
    read.context.execution_no_progress_timeout_s = settings.deadline_s
    return read


@contextmanager
def as_user_errors(label: str, settings: config.Encode) -> Iterator[None]:
    """Has what ends a pass of encoders told in the block as a user should read it."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):  # Ray Data adds lines on retries to what it says
            raise type(error.cause)(first_line(error.cause)) from None
        raise
    except (RayActorError, OutOfMemoryError) as error:
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise  # it raised as it started, and says why
        raise InfrastructureError(
            f"{label}: an encoder died more often than encode.retries = {settings.retries} allows "
            f"({first_line(error)}); its log says more, and the same command tries again."
        ) from None
    except ExecutionTimeoutError:
        raise InfrastructureError(
            f"{label}: nothing was read for {settings.deadline_s:.0f} s, which is encode.deadline_s; {room(settings)}. "
            "What an encoder was at is in its log, and the same command tries again."
        ) from None


def room(settings: config.Encode) -> str:
    """What the cluster has free beside what each encoder asks for, where Ray is up."""
    free, there = ray.available_resources(), ray.cluster_resources()
    asked = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    return ", ".join(
        f"{free.get(name, 0.0):g} of {there.get(name, 0.0):g} {name}s are free, an encoder asks for {each:g}"
        for name, each in asked.items()
        if each
    )


def encode_items(engine: EngineSpec, ids: list[str], items: Prompts, batch_size: int, uri: str) -> None:
    """Writes the intents' text embeddings (readout item) as one file."""
    reader = engine.start()
    parts = [items.texts[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    vectors = [reader.embed(replace(items, texts=part)) for part in parts]
    count = len(ids)
    table = vectors_table(ids, ["item"] * count, [-1] * count, [None] * count, np.concatenate(vectors), reader.version)
    storage.write_table(uri, table)
