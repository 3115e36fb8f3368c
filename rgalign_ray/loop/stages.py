"""The closed loop as a list: log → ranker on the frozen reasoner → (align the reasoner → ranker)* → evaluation."""

from __future__ import annotations

from rgalign_ray.config import Config
from rgalign_ray.loop import (
    align_stages,
    audit_stages,
    evaluate_stages,
    judge_stages,
    log_stages,
    rank_stages,
    worth_stages,
)
from rgalign_ray.loop.stage import Stage


def stages(config: Config) -> list[Stage]:
    """All stages of a run, each after those it reads from."""
    sequence = [
        *log_stages.stages(config),
        *rank_stages.reading_stages(config, 0),
        rank_stages.rankers_stage(config, 0),
        *audit_stages.stages(config),
        *audit_stages.audited_stages(config, 0),
    ]
    for round_ in range(1, config.rounds + 1):
        sequence += [
            *judge_stages.stages(config, round_),
            *worth_stages.stages(config, round_),
            *align_stages.stages(config, round_),
            *rank_stages.reading_stages(config, round_),
            *audit_stages.audited_stages(config, round_),
            rank_stages.rankers_stage(config, round_),
            *rank_stages.control_stages(config, round_),
        ]
    return [*sequence, *evaluate_stages.stages(config)]
