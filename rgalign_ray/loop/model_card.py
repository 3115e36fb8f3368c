"""What goes with an aligned reasoner wherever it is taken: what it is, what it was made of, and its limits."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
import yaml

from rgalign_ray import __version__, storage
from rgalign_ray.loop import rank_stages
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner import models

FILE = "README.md"
"""Where hubs look for it."""
OBJECTIVES = {
    "sft": ("RG-SFT", "the best of N queries"),
    "dpo": ("RG-DPO", "the best query against a worse one"),
    "grpo": ("RG-GRPO", "on-policy, within a session's group"),
    "contrastive": ("RG-CL", "query vectors against the clicked intents"),
    "gradient": ("ranking gradient", "the ranking loss through the frozen ranker"),
    "latent": ("latent RL", "reinforcement learning on the embedding"),
}
"""What each is called, and what it learns from."""


def write(
    run: Run, out: str, stage: str, round_: int, objective: str, weights: str | None, figures: dict[str, Any]
) -> None:
    """Writes the card of the reasoner in `out`, which one objective of a round has made.

    Equal inputs give equal cards.

    Args:
        run: that it belongs to.
        out: the artefact, not whole yet.
        stage: its name.
        round_: 1 and up.
        objective: that made it.
        weights: artefact that it started from; None: the base model.
        figures: of its training; of those that are a value a step the first and the last are told.
    """
    config = run.config
    names = [name for folds in rank_stages.judge_names(config)[:-1] for name in folds]
    judges = [scoring.load_meta(run.uri(f"rankers_{round_ - 1}", name)) for name in names]
    inputs = [f"selected_{round_}", f"rankers_{round_ - 1}", *([weights] if weights else [])]
    shown = {
        name: (_number(values[0]), _number(values[-1]))
        if isinstance(values, list) and values
        else ("", _number(values))
        for name, values in figures.items()
        if isinstance(values, int | float)
        or (isinstance(values, list) and values and isinstance(values[0], int | float))
    }
    template = jinja2.Template(
        resources.files("rgalign_ray").joinpath("loop/model_card.md.j2").read_text(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = template.render(
        base_model=config.reasoner.model,
        adapter=config.reasoner.lora is not None,
        version=models.version_of(config.reasoner, out),
        objective=objective,
        objective_name="{} ({})".format(*OBJECTIVES[objective]),
        log="the simulated shop" if config.log.source == "shop" else config.log.source,
        simulated=config.log.source == "shop",
        sessions=f"{figures['sessions']:,}",
        crossfit=bool(config.crossfit),
        starts_from=models.version_of(config.reasoner, run.uri(weights)) if weights else config.reasoner.model,
        ranker=" + ".join(judge.version for judge in judges),
        ranker_reads=judges[0].reasoner_version,
        settings=yaml.safe_dump(
            getattr(config, objective).model_dump(mode="json"), default_flow_style=True, width=10**6
        ).strip(),
        stage=stage,
        key=run.stage_key,
        inputs={name: run.manifest(name).key for name in inputs},
        rgalign_version=__version__,
        figures=shown,
    )
    storage.write_bytes(storage.join(out, FILE), text.encode())


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
