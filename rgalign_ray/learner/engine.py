"""What every objective shares: the model to train, DeepSpeed's configuration, and the export of the result.

No Ray in here: an objective runs wherever torch.distributed has a process group.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist

from rgalign_ray import config, storage
from rgalign_ray.logs.prompts import Template
from rgalign_ray.reasoner import models

if TYPE_CHECKING:  # likewise in training.py
    from transformers import PreTrainedModel

SELECTED, PAIRS, POSITIVES = "selected", "pairs", "positives"
"""Folders of what objectives learn from: RG-SFT, RG-DPO, and those of the embedding."""
IGNORE = -100
"""Label of a token without loss: all of the prompt."""


@dataclass(frozen=True, slots=True)
class FrozenPair:
    """The reward model: rankers and the reasoner whose embeddings they read, over the round's sessions."""

    rankers: tuple[str, ...]
    """Ranker artefacts; the reward is the mean of theirs."""
    encoder: str | None
    """Reasoner artefact; None is the base model."""
    sessions: str
    """The round's sessions."""
    log: str
    """The ingested log, for its knowledge base."""
    reward: config.Reward


@dataclass(frozen=True, slots=True)
class Stream:
    """Where judged groups come from, and where the weights go that sample the next."""

    actor: str
    """Name of the actor, a `rollout.on_policy.OnPolicyStream`."""
    weights: str
    """Folder of reasoner artefacts by version."""


@dataclass(frozen=True, slots=True)
class LearnerTask:
    """One objective's work; plain data that travels to the learners."""

    objective: str
    reasoner: config.Reasoner
    learner: config.Learner
    optimisation: config.Optimisation
    weights: str | None
    """Reasoner artefact to start from; None starts from the base model."""
    data: str
    """Folder that holds `SELECTED`, `PAIRS` and `POSITIVES`."""
    out: str
    """Folder that receives the new reasoner artefact."""
    version: str
    """Version name of the new reasoner."""
    seed: int
    pair: FrozenPair | None
    """Of objectives that ask the ranker itself."""
    prompt: config.Prompt
    template: Template
    """Of `prompt`, as the driver has read it: a path says nothing where a learner works."""
    rollout: config.Rollout
    """Of RG-GRPO, which samples as it learns."""
    stream: Stream | None = None
    """Of judged groups; None: learners sample and judge by themselves."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.learner.use_gpu else "cpu")

    @property
    def bf16(self) -> bool:
        return self.learner.bf16 is True

    @property
    def micro_steps(self) -> int:
        """Forward passes of one worker in one optimiser step."""
        return self.optimisation.batch_sessions // (self.learner.ranks * self.learner.micro_batch)


class Host:
    """What runs an objective: it hears of each optimiser step, and may keep the state from which another try goes on.

    This one does neither.
    """

    resume_from: str | None = None
    """Folder of a state that an earlier try left with `keep`; None: there is none."""

    def advance(self, steps: int) -> None:
        """Hears of optimiser steps, on every rank."""

    def due(self) -> bool:
        """Whether the state shall be kept now; every rank asks after every step but the last, and hears the same."""
        return False

    def keep(self, folder: str, step: int) -> None:
        """Takes a copy of what this rank has written into a folder: its part of the state after `step` steps."""


T = TypeVar("T")


def in_steps(items: Sequence[T], optimisation: config.Optimisation, seed: int) -> list[list[T]]:
    """What each optimiser step learns from, over all workers: every epoch in an order of its own, its last step filled
    up with its first.
    """
    size, steps = optimisation.batch_sessions, []
    for epoch in range(optimisation.epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(items))
        filled = [items[order[place % len(order)]] for place in range(math.ceil(len(order) / size) * size)]
        steps += [filled[start : start + size] for start in range(0, len(filled), size)]
    return steps


def schedule(steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Factor of the learning rate by step: a linear warm-up, whose first step moves already, then a cosine to zero."""
    warmup = max(round(steps * warmup_ratio), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor


def trainable(task: LearnerTask) -> PreTrainedModel:
    """The model whose weights the objective moves: LoRA layers over frozen base weights, or all weights.

    A round's second objective continues the adapter of its first.
    """
    torch.manual_seed(task.seed)  # fresh adapters are drawn at random; every rank must draw the same
    settings = task.reasoner.model_copy(update={"dtype": "bfloat16" if task.bf16 else "float32"})
    if settings.lora is None:
        return models.load_reasoner(settings, task.weights).train()
    from peft import PeftModel, get_peft_model

    base = models.load_base(settings)
    if task.weights is not None:
        with models.local_copy(task.weights) as folder:
            return PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    return get_peft_model(base, models.lora_config(settings.lora, base.config.num_hidden_layers)).train()


def deepspeed_config(task: LearnerTask) -> dict[str, Any]:
    """DeepSpeed's configuration: stage, precision and batch sizes. Optimisers are torch's, which need no compiler."""
    return {
        "train_micro_batch_size_per_gpu": task.learner.micro_batch,
        "gradient_accumulation_steps": task.micro_steps,
        "gradient_clipping": task.optimisation.max_grad_norm,
        "bf16": {"enabled": task.bf16},
        "zero_optimization": {
            "stage": task.learner.zero_stage,
            "overlap_comm": False,  # a second stream has no meaning on CPU, and hides races on GPU
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def forbid_compilation() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives inside `initialize`.

    The build takes over a minute, needs a compiler, and a worker killed during it leaves a lock on which
    every later run waits for ever; gloo does the same work.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def export(model: PreTrainedModel, task: LearnerTask) -> None:
    """Writes the reasoner artefact (safetensors) from rank 0; every rank must call it, since ZeRO-3 gathers."""
    import deepspeed

    full = task.reasoner.lora is None
    parameters = [p for p in model.parameters() if full or p.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters, enabled=task.learner.zero_stage == 3):
        if dist.get_rank() == 0:
            save(model, task, task.out, task.version)
    dist.barrier()


def save(model: PreTrainedModel, task: LearnerTask, out: str, version: str) -> None:
    """Writes whole weights in memory as a reasoner artefact into folder `out`."""
    full = task.reasoner.lora is None
    with tempfile.TemporaryDirectory() as folder:
        # of the adapters only the trained one: DPO's reference is an adapter as well
        chosen = {} if full else {"selected_adapters": ["default"]}
        model.save_pretrained(folder, safe_serialization=True, **chosen)
        fs, path = storage.filesystem(out)
        fs.create_dir(path, recursive=True)
        pafs.copy_files(folder, path, destination_filesystem=fs)
    models.describe(out, base=task.reasoner.model, version=version, adapter=not full)
