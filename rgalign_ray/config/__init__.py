"""The whole configuration as typed models: YAML, `--set a.b=c`, and nothing unknown.

Each model holds the settings of one room of the house. This package imports neither torch nor ray, so that a config can
be checked anywhere.
"""

from __future__ import annotations

from rgalign_ray.config.alignment import (
    AlignName,
    Contrastive,
    Dpo,
    Embedding,
    Gradient,
    Grpo,
    Latent,
    Learner,
    Optimisation,
    Select,
    Sft,
)
from rgalign_ray.config.base import DATA_CPUS, Placed, Settings, Trained, commented
from rgalign_ray.config.data import Features, Log, Roles, TauRetail, World
from rgalign_ray.config.ranking import Baseline, Model, QueryInput, RankBy, Ranker, Reward
from rgalign_ray.config.reasoning import Encode, Endpoint, Lora, Prompt, Reasoner, Rollout, Sampling, Teacher, Vllm
from rgalign_ray.config.root import Config, available, changed, load, validate, with_setting
from rgalign_ray.config.service import Cluster, Folder, Serve, Tracking, Variant
from rgalign_ray.config.study import ROW_NAMES, Compare, Evaluate, RowName

__all__ = [
    "DATA_CPUS",
    "ROW_NAMES",
    "AlignName",
    "Baseline",
    "Cluster",
    "Compare",
    "Config",
    "Contrastive",
    "Dpo",
    "Embedding",
    "Encode",
    "Endpoint",
    "Evaluate",
    "Features",
    "Folder",
    "Gradient",
    "Grpo",
    "Latent",
    "Learner",
    "Log",
    "Lora",
    "Model",
    "Optimisation",
    "Placed",
    "Prompt",
    "QueryInput",
    "RankBy",
    "Ranker",
    "Reasoner",
    "Reward",
    "Roles",
    "Rollout",
    "RowName",
    "Sampling",
    "Select",
    "Serve",
    "Settings",
    "Sft",
    "TauRetail",
    "Teacher",
    "Tracking",
    "Trained",
    "Variant",
    "Vllm",
    "World",
    "available",
    "changed",
    "commented",
    "load",
    "validate",
    "with_setting",
]
