"""Who reads sessions in a round: its reasoner, or a sentence encoder; and in which interpreter workers sample."""

from __future__ import annotations

from dataclasses import replace

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.loop.stage import Run
from rgalign_ray.reasoner.engine import EngineSpec

KEPT = "reader.json"
HOW = {"dtype", "pooling", "depth"}
"""Settings of the reasoner that tell how it reads."""
BEFORE = {"pooling": "last", "depth": 1.0}
"""How it did in runs that do not say so: those of before it could be set."""


def reasoner_stage(config: Config, round_: int) -> str | None:
    """The stage whose artefact is reasoner r: the last objective of its round; None for the base model."""
    return f"align_{round_}_{config.align[-1]}" if round_ > 0 and config.align else None


def engine_spec(run: Run, round_: int) -> EngineSpec:
    """How to start reasoner r where sessions are read: by transformers, since vLLM gives no hidden states."""
    stage = reasoner_stage(run.config, round_)
    config = run.config
    reasoner = config.reasoner.model_copy(update={"engine": "transformers"})
    return EngineSpec(reasoner, config.prompt.max_session_tokens, run.uri(stage) if stage else None)


def keep_reader(engine: EngineSpec, embeddings_uri: str) -> None:
    """Writes how sessions were read beside what was read, as `Template.keep` does with the prompt."""
    storage.write_json(
        storage.join(embeddings_uri, KEPT),
        engine.reasoner.model_dump(include=HOW) | {"max_session_tokens": engine.max_session_tokens},
    )


def engine_of_run(run: Run, round_: int) -> EngineSpec:
    """As `engine_spec`, but as embeddings_r were read: the run's settings may be of a try that has not come so far."""
    engine, place = engine_spec(run, round_), run.uri(f"embeddings_{round_}", KEPT)
    if not storage.exists(place):  # of a run that was made before this was kept
        return engine
    kept = BEFORE | storage.read_json(place)
    reasoner = engine.reasoner.model_copy(update={name: kept[name] for name in HOW})
    return replace(engine, reasoner=reasoner, max_session_tokens=kept["max_session_tokens"])


def sentence_engine(config: Config) -> EngineSpec:
    return EngineSpec(config.compare.encoder, config.compare.max_text_tokens, None)


def interpreter(config: Config, engine: str) -> str | None:
    """Of the workers that sample with an engine, where it is not this one."""
    return config.reasoner.vllm.python if engine == "vllm" else None
