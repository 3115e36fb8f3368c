"""RG-CL: the reasoner's embedding learns to point at the intents that were clicked.

  prompt (+ latent query) ──▶ LLM ──▶ e(x), e(x,q) ──▶ the ranker's frozen query tower ──▶ z
  InfoNCE of ⟨z, v_i⟩/τ + log base rate_i over the frozen vectors of the whole knowledge base

The reading through the ranker's own tower is the point: a free projection would absorb the loss and
leave the LLM where it was. The base rates stand in the logits so that popularity is already known, and
what is left to learn is the session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from rgalign_ray import config, storage
from rgalign_ray.learner import engine
from rgalign_ray.learner.engine import Advance, LearnerTask
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.transformers_engine import stop_tokens


def info_nce(logits: torch.Tensor, positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE over the whole knowledge base, one term per positive, the other positives masked.

    Args:
        logits: float [B, I].
        positives: bool [B, I], at least one a row.

    Returns:
        loss [B]: -log p of a positive against all non-positives, mean over the row's positives.
        correct [B]: share of the row's positives that stand above every non-positive.
    """
    negatives = torch.logsumexp(logits.masked_fill(positives, -math.inf), dim=-1, keepdim=True)
    log_p = logits - torch.logaddexp(logits, negatives)
    hardest = logits.masked_fill(positives, -math.inf).amax(dim=-1, keepdim=True)
    count = positives.sum(dim=-1)
    loss = -torch.where(positives, log_p, 0.0).sum(dim=-1) / count
    correct = ((logits > hardest) & positives).sum(dim=-1) / count
    return loss, correct


class EmbeddingReader(nn.Module):
    """The LLM without its output head: token rows in, hidden states at chosen places out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, P, H] at places [B, P] of right-padded rows [B, T]."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = causal.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).float()


def train(task: LearnerTask, advance: Advance) -> dict[str, Any]:
    """Aligns embeddings on `selected.parquet` and `positives.parquet` and exports the reasoner.

    Sessions without a selected query are read at e(x) alone.

    Args:
        task: data, weights, ranker and settings; `task.optimisation` is `config.Contrastive`.
        advance: called after each optimiser step.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss` (nats) and `accuracy` (share of
        positives above every non-positive).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Contrastive)
    import deepspeed

    engine.forbid_compilation()
    ranker = _frozen(task)
    rows = _Rows(task, settings.readouts, ranker)
    reader = EmbeddingReader(engine.trainable(task))
    parameters = [p for p in reader.parameters() if p.requires_grad]
    steps = math.ceil(len(rows) / settings.batch_sessions) * settings.epochs
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    learner, _, _, _ = deepspeed.initialize(
        model=reader,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps, settings.warmup_ratio)),
        config=engine.deepspeed_config(task),
        dist_init_required=False,
    )
    curve = [_step(learner, ranker, rows, settings, task, step, advance) for step in range(steps)]
    engine.export(reader.model, task)
    return {"sessions": len(rows), "steps": steps, "loss": [c[0] for c in curve], "accuracy": [c[1] for c in curve]}


def _step(
    learner: Any,
    ranker: QERec,
    rows: _Rows,
    settings: config.Contrastive,
    task: LearnerTask,
    step: int,
    advance: Advance,
) -> tuple[float, float]:
    """One optimiser step; its global mean loss and accuracy."""
    totals = torch.zeros(3, dtype=torch.float64)
    for micro in range(task.micro_steps):
        chosen = rows.batch(step, micro, settings, task, dist.get_rank())
        batch = rows.tensors(chosen, learner.device)
        embeddings = learner(batch["input_ids"], batch["mask"], batch["places"])
        z = ranker.queries(embeddings, torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=learner.device))
        logits = ranker.query_logits(z)
        positives = batch["positives"][:, None].expand(logits.shape)
        loss, correct = info_nce(logits.flatten(0, 1), positives.flatten(0, 1))
        weight = batch["weight"].flatten()
        # every session counts the same, in a short last batch and behind a missing readout too
        learner.backward((loss * weight).sum() / task.learner.micro_batch)
        learner.step()
        totals += torch.stack([(loss * weight).sum(), (correct * weight).sum(), weight.sum()]).detach().cpu().double()
    dist.all_reduce(totals)
    advance(1)
    mean = totals[:2] / totals[2]
    return float(mean[0]), float(mean[1])


class _Rows:
    """The training sessions; a batch is a pure function of step and rank."""

    def __init__(self, task: LearnerTask, readouts: Sequence[str], ranker: QERec) -> None:
        self.table = storage.read_table(storage.join(task.data, "positives.parquet")).sort_by("session_id")
        self.intents = ranker.items().shape[0]
        self.readouts = readouts
        tokenizer = models.load_tokenizer(task.reasoner.model)
        self.stops = stop_tokens(tokenizer)
        self.pad = tokenizer.pad_token_id

    def __len__(self) -> int:
        return self.table.num_rows

    def batch(self, step: int, micro: int, settings: config.Contrastive, task: LearnerTask, rank: int) -> list[int]:
        """Row numbers of one micro-batch; -1 fills the places that a short last batch leaves empty."""
        per_epoch = math.ceil(len(self) / settings.batch_sessions)
        epoch, place = divmod(step, per_epoch)
        order = np.random.Generator(np.random.Philox(key=[task.seed, epoch])).permutation(len(self))
        order = np.concatenate([order, np.full(-len(order) % settings.batch_sessions, -1)])
        start = place * settings.batch_sessions + (micro * task.workers + rank) * task.learner.micro_batch
        return order[start : start + task.learner.micro_batch].tolist()

    def tensors(self, rows: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids, mask [B, T]; places, weight [B, readouts]; positives [B, I]. Empty places weigh nothing."""
        sessions = self.table.take(pa.array([max(row, 0) for row in rows])).to_pylist()
        tokens, places, weights = [], [], []
        positives = torch.zeros(len(rows), self.intents, dtype=torch.bool)
        for number, (row, session) in enumerate(zip(rows, sessions, strict=True)):
            prompt = session["prompt_ids"]
            query = [token for token in session["completion_ids"] or [] if token not in self.stops]
            read = {"prompt": len(prompt) - 1, "query": len(prompt) + len(query) - 1}
            tokens.append(prompt + (query if "query" in self.readouts else []))
            places.append([read[readout] for readout in self.readouts])
            present = [readout == "prompt" or bool(query) for readout in self.readouts]
            weights.append([(row >= 0) * here / max(sum(present), 1) for here in present])
            positives[number, session["positives"]] = True
        width = max(len(row) for row in tokens)
        return {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in tokens], device=device),
            "mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens], device=device),
            "places": torch.tensor(places, device=device),
            "weight": torch.tensor(weights, device=device),
            "positives": positives.to(device),
        }


def _frozen(task: LearnerTask) -> QERec:
    assert task.ranker is not None
    model = scoring.load(task.ranker).model
    assert isinstance(model, QERec)
    return model


def _schedule(steps: int, warmup_ratio: float) -> Any:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(round(steps * warmup_ratio), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor
