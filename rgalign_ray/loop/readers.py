"""Who reads sessions in a round: its reasoner, or a sentence encoder."""

from __future__ import annotations

from rgalign_ray.config import Config
from rgalign_ray.loop.stage import Run
from rgalign_ray.reasoner.engine import EngineSpec


def reasoner_stage(config: Config, round_: int) -> str | None:
    """The stage whose artefact is reasoner r: the last objective of its round; None for the base model."""
    return f"align_{round_}_{config.align[-1]}" if round_ > 0 and config.align else None


def engine_spec(run: Run, round_: int) -> EngineSpec:
    """How to start reasoner r where sessions are read: by transformers, since vLLM gives no hidden states."""
    stage = reasoner_stage(run.config, round_)
    config = run.config
    reasoner = config.reasoner.model_copy(update={"engine": "transformers"})
    return EngineSpec(reasoner, config.prompt.max_session_tokens, run.uri(stage) if stage else None)


def sentence_engine(config: Config) -> EngineSpec:
    return EngineSpec(config.compare.encoder, config.compare.max_text_tokens, None)
