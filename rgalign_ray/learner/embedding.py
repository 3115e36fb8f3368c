"""The loop of the objectives that move the reasoner's embedding through the frozen ranker.

  prompt (+ latent query) ──▶ LLM ──▶ e(x), e(x,q) ──▶ the ranker's frozen query tower ──▶ an objective's loss

The reading through the ranker's own tower is the point: a free projection would absorb the loss and
leave the LLM where it was.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgalign_ray import config, storage
from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Host, LearnerTask
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.transformers_engine import stop_tokens


class Objective(Protocol):
    """What embeddings are asked for."""

    measure: str
    """Name of what it returns beside the loss."""

    def __call__(self, embeddings: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """Loss and measure, both [B, P], of embeddings float32 [B, P, H].

        Args:
            embeddings: of B sessions, each at P places (readouts).
            rows: [B], the sessions' places in the round's table, which is sorted by id.
            step: the optimiser step.
        """
        ...


class EmbeddingReader(nn.Module):
    """The LLM without its output head: token rows in, hidden states at chosen places out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Hidden states [B, P, H] at places [B, P] of right-padded rows [B, T]."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = causal.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).float()


def train(task: LearnerTask, host: Host, objective: Callable[[LearnerTask, pa.Table], Objective]) -> dict:
    """Aligns embeddings on `positives` and exports the reasoner.

    Sessions without a selected query are read at e(x) alone.

    Args:
        task: data, weights, ranker and settings; `task.optimisation` is `config.Embedding`.
        host: hears of each optimiser step, and keeps the state.
        objective: makes the objective from the task and the round's table.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss` and the objective's measure, as means
        over sessions.
    """
    settings = task.optimisation
    assert isinstance(settings, config.Embedding)
    import deepspeed

    engine.forbid_compilation()
    rows = Rows(task, settings.readouts)
    asked = objective(task, rows.table)
    reader = EmbeddingReader(engine.trainable(task))
    parameters = [p for p in reader.parameters() if p.requires_grad]
    steps = math.ceil(len(rows) / settings.batch_sessions) * settings.epochs
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    learner, _, _, _ = deepspeed.initialize(
        model=reader,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, engine.schedule(steps, settings.warmup_ratio)),
        config=engine.deepspeed_config(task),
        dist_init_required=False,
    )
    curve: list[tuple[float, float]] = []
    if host.resume_from is not None:
        _, kept = learner.load_checkpoint(host.resume_from, load_module_strict=False)  # frozen weights are not in it
        curve = kept["curve"]
    for step in range(len(curve), steps):
        curve.append(_step(learner, asked, rows, task, step))
        host.advance(1)
        if step + 1 < steps and host.due():
            with tempfile.TemporaryDirectory() as folder:
                learner.save_checkpoint(folder, client_state={"curve": curve}, exclude_frozen_parameters=True)
                host.keep(folder, step + 1)
    engine.export(reader.model, task)
    return {
        "sessions": len(rows),
        "steps": steps,
        "loss": [loss for loss, _ in curve],
        asked.measure: [measure for _, measure in curve],
    }


def _step(learner: Any, objective: Objective, rows: Rows, task: LearnerTask, step: int) -> tuple[float, float]:
    """One optimiser step; its global mean loss and measure."""
    # dropout follows from the step and the rank, for a run that goes on to equal one that was not disturbed
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step, dist.get_rank()]).generate_state(1)[0]))
    totals = torch.zeros(3, dtype=torch.float64)
    for micro in range(task.micro_steps):
        chosen = rows.batch(step, micro, task, dist.get_rank())
        batch = rows.tensors(chosen, learner.device)
        embeddings = learner(batch["input_ids"], batch["mask"], batch["places"])
        loss, measure = objective(embeddings, [max(row, 0) for row in chosen], step)
        weight = batch["weight"]
        # every session counts the same, in a short last batch and behind a missing readout too
        learner.backward((loss * weight).sum() / task.learner.micro_batch)
        learner.step()
        totals += torch.stack([(loss * weight).sum(), (measure * weight).sum(), weight.sum()]).detach().cpu().double()
    dist.all_reduce(totals)
    mean = totals[:2] / totals[2]
    return float(mean[0]), float(mean[1])


class Rows:
    """The training sessions; a batch is a pure function of step and rank."""

    def __init__(self, task: LearnerTask, readouts: Sequence[str]) -> None:
        self.table = storage.read_table(storage.join(task.data, engine.POSITIVES)).sort_by("session_id")
        self.readouts = readouts
        tokenizer = models.load_tokenizer(task.reasoner.model)
        self.stops = stop_tokens(tokenizer)
        self.pad = tokenizer.pad_token_id

    def __len__(self) -> int:
        return self.table.num_rows

    def batch(self, step: int, micro: int, task: LearnerTask, rank: int) -> list[int]:
        """Row numbers of one micro-batch; -1 fills the places that a short last batch leaves empty."""
        size = task.optimisation.batch_sessions
        epoch, place = divmod(step, math.ceil(len(self) / size))
        order = np.random.Generator(np.random.Philox(key=[task.seed, epoch])).permutation(len(self))
        order = np.concatenate([order, np.full(-len(order) % size, -1)])
        start = place * size + (micro * task.learner.workers + rank) * task.learner.micro_batch
        return order[start : start + task.learner.micro_batch].tolist()

    def tensors(self, rows: list[int], device: torch.device) -> dict[str, Tensor]:
        """input_ids, mask [B, T]; places, weight [B, readouts]. Empty places weigh nothing."""
        sessions = self.table.take(pa.array([max(row, 0) for row in rows])).to_pylist()
        tokens, places, weights = [], [], []
        for row, session in zip(rows, sessions, strict=True):
            prompt = session["prompt_ids"]
            query = [token for token in session["completion_ids"] or [] if token not in self.stops]
            read = {"prompt": len(prompt) - 1, "query": len(prompt) + len(query) - 1}
            tokens.append(prompt + (query if "query" in self.readouts else []))
            places.append([read[readout] for readout in self.readouts])
            present = [readout == "prompt" or bool(query) for readout in self.readouts]
            weights.append([(row >= 0) * here / max(sum(present), 1) for here in present])
        width = max(len(row) for row in tokens)
        return {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in tokens], device=device),
            "mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens], device=device),
            "places": torch.tensor(places, device=device),
            "weight": torch.tensor(weights, device=device),
        }
