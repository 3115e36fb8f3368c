"""Stages that read the log with a reasoner and train rankers on it: items, embeddings, rankers and controls."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Literal

import ray

from rgalign_ray import progress, storage
from rgalign_ray.config import Config
from rgalign_ray.evaluate.examples import example_sessions
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.stage import Outcome, Run, Stage
from rgalign_ray.ranker import training
from rgalign_ray.ranker.training import RankerJob
from rgalign_ray.rollout import encode
from rgalign_ray.rollout.worker import EngineSpec

ITEMS_DEADLINE_S = 1800.0
ENCODED = ("rank", "valid", "test")
"""Roles that the encode pass reads; align is read by the rollout workers."""


def stages(config: Config, round_: int) -> list[Stage]:
    """Embeddings of reasoner r and ranker r; in round 0 also the baselines and the reward's other judges."""
    embeddings = f"embeddings_{round_}"
    reads = ("prompt", "reasoner", "encode", "rollout", "evaluate")
    reasoner = reasoner_stage(config, round_)
    inputs = ("sessions", *((reasoner,) if reasoner else ()))
    who = "frozen reasoner" if round_ == 0 else f"aligned reasoner {round_}"
    sequence = [
        Stage(
            embeddings,
            f"read sessions with the {who}",
            partial(encode_sessions, round_=round_),
            reads,
            inputs,
            ray=True,
        )
    ]
    trained: list[tuple[str, str, str, int, bool]] = [(f"ranker_{round_}", "QE-Rec", "qe_rec", 0, False)]
    if round_ < config.rounds:
        trained += [
            (f"ranker_{round_}_judge_{judge}", f"QE-Rec, another seed ({judge})", "qe_rec", judge, False)
            for judge in range(1, config.reward.judge_seeds)
        ]
    trained.append((f"ranker_{round_}_shuffled", "control: queries shuffled across users", "qe_rec", 0, True))
    if round_ == 0:
        sequence.insert(
            0, Stage("items", "read the knowledge base", encode_items, ("prompt", "reasoner"), ("sessions",), ray=True)
        )
        trained = [(name, "baseline", name, 0, False) for name in config.baselines] + trained
    for name, does, kind, seed, shuffled in trained:
        needs = ("sessions", "features", "items", *((embeddings,) if kind == "qe_rec" else ()))
        train = partial(train_ranker, name=name, kind=kind, round_=round_, seed=seed, shuffled=shuffled)
        sequence.append(Stage(name, f"train {does}", train, ("ranker",), needs, ray=True))
    return sequence


def reasoner_stage(config: Config, round_: int) -> str | None:
    """The stage whose artefact is reasoner r: the last objective of its round; None for the base model."""
    return f"align_{round_}_{config.align[-1]}" if round_ > 0 and config.align else None


def engine_spec(run: Run, round_: int) -> EngineSpec:
    stage = reasoner_stage(run.config, round_)
    config = run.config
    return EngineSpec(config.reasoner, config.prompt.max_session_tokens, run.uri(stage) if stage else None)


def encode_items(run: Run, out: str) -> Outcome:
    """Text embeddings of the intents by the base model: one version for all rankers, so that items compare."""
    catalogue = Catalogue.load(run.uri("sessions"))
    texts = Template.load(run.config.prompt.template).items(catalogue.intents)
    settings = run.config.encode
    task = ray.remote(encode.encode_items).options(
        num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_retries=3
    )
    done = task.remote(
        engine_spec(run, 0), catalogue.ids, texts, settings.batch_size, storage.join(out, "items.parquet")
    )
    ray.get(done, timeout=ITEMS_DEADLINE_S)
    return Outcome(rows={"intents": catalogue.size})


def encode_sessions(run: Run, out: str, round_: int) -> Outcome:
    config = run.config
    sessions = run.manifest("sessions")
    plan = encode.EncodePlan(
        log_uri=run.uri("sessions"),
        template=Template.load(config.prompt.template),
        roles=ENCODED,
        queries_for=("valid", "test") if config.evaluate.readout == "query" else (),
        query_sessions=tuple(example_sessions(run.uri("sessions"), config.evaluate)),
        encode=config.encode,
        sampling=config.rollout,
        run_seed=config.seed,
        round=round_,
    )
    total = sum(sessions.figures["roles"].get(role, 0) for role in ENCODED)
    with progress.track("encode", total, "sessions") as advance:
        counts = encode.encode(plan, engine_spec(run, round_), out, advance)
    return Outcome(rows=counts, figures={"valid_rate": counts["valid"] / max(counts["sampled"], 1)})


def train_ranker(
    run: Run, out: str, name: str, kind: Literal["qe_rec", "two_tower"], round_: int, seed: int, shuffled: bool
) -> Outcome:
    job = RankerJob(
        kind=kind,
        log_uri=run.uri("sessions"),
        space=storage.read_json(run.uri("features", "features.json")),
        out_uri=out,
        settings=run.config.ranker,
        seed=run.config.seed * 1000 + seed,
        storage_uri=run.uri(".train"),
        run_name=f"{name}-{storage.content_key(out)}",
        embeddings_uri=run.uri(f"embeddings_{round_}") if kind == "qe_rec" else None,
        item_embeddings_uri=run.uri("items"),
        shuffle_queries=shuffled,
    )
    figures = training.train(job).figures
    return Outcome(rows={"epochs": figures["epoch"]}, figures=figures)
