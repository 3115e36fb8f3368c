"""The loop of the objectives that move the reasoner's embedding through the frozen ranker.

  prompt (+ latent query) ──▶ LLM ──▶ e(x), e(x,q) ──▶ the ranker's frozen query tower ──▶ an objective's loss
                               └────▶ log p(query | prompt) ──▶ RG-SFT's loss, by `text_weight`

The reading through the ranker's own tower is the point: a free projection would absorb the loss and
leave the LLM where it was.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from rgalign_ray.learner.token_rows import Layout
from rgalign_ray.reasoner import models, reading
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


class Reader(nn.Module):
    """The LLM: rows of tokens in, embeddings and what their text costs out."""

    def __init__(self, model: PreTrainedModel, settings: config.Reasoner) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self,
        inputs: dict[str, Tensor],
        of: Tensor,
        places: Tensor,
        counts: Tensor,
        text: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, H], means of the states of tokens; and [B], the mean loss of a row's text (nats a token), 0
        where there is none.

        Args:
            inputs: as `TokenRows` has them.
            of, places: of M tokens that are read which of the B·P embeddings they are of, and where they are among the
                tokens of `inputs`, one after another; [M] each.
            counts: [B, P], how many tokens each embedding is of.
            text: of M' tokens that have a loss the row they are of, the place before them, and which they are, [M']
                each.
        """
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        last, read = reading.forward(causal, self.settings)(**inputs, use_cache=False)
        read = read.flatten(0, 1)[places].float()
        summed = read.new_zeros(counts.numel(), read.shape[-1]).index_add(0, of, read)
        embeddings = summed.view(*counts.shape, -1) / counts[..., None]
        costs = embeddings.new_zeros(len(counts))
        if text is None:
            return embeddings, costs
        row, before, token = text
        logits = causal.get_output_embeddings()(last.flatten(0, 1)[before])
        losses = nn.functional.cross_entropy(logits.float(), token, reduction="none")
        return embeddings, costs.index_add(0, row, losses) / row.bincount(minlength=len(counts)).clamp(min=1)


def train(task: LearnerTask, host: Host, objective: Callable[[LearnerTask, pa.Table], Objective]) -> dict:
    """Aligns embeddings on `positives` and exports the reasoner.

    Sessions without a selected query are read at e(x) alone.

    Args:
        task: data, weights, ranker and settings; `task.optimisation` is `config.Embedding`.
        host: hears of each optimiser step, and keeps the state.
        objective: makes the objective from the task and the round's table.

    Returns:
        figures: `sessions`, `steps`, and per optimiser step `loss` and the objective's measure, as means over sessions;
        with `text_weight`, `text_loss` over those with a selected query as well (nats a token).
    """
    settings = task.optimisation
    assert isinstance(settings, config.Embedding)
    import deepspeed

    engine.forbid_compilation()
    model = engine.trainable(task)
    rows = Rows(task, settings, model)
    asked = objective(task, rows.table)
    reader = Reader(model, task.reasoner)
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
    curve: list[tuple[float, float, float]] = []
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
    names = ["loss", asked.measure, *(["text_loss"] if settings.text_weight else [])]
    curves = {name: [values[column] for values in curve] for column, name in enumerate(names)}
    return {"sessions": len(rows), "steps": steps, **curves}


def _step(learner: Any, objective: Objective, rows: Rows, task: LearnerTask, step: int) -> tuple[float, float, float]:
    """One optimiser step; its global mean loss, measure, and loss of the text."""
    # dropout follows from the step and the rank, for a run that goes on to equal one that was not disturbed
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step, dist.get_rank()]).generate_state(1)[0]))
    totals, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for micro in range(task.micro_steps):
        chosen = rows.batch(step, micro, task, dist.get_rank())
        batch = rows.micro_batch(chosen, learner.device)
        embeddings, text = learner(batch.inputs, batch.of, batch.places, batch.counts, batch.text)
        loss, measure = objective(embeddings, [max(row, 0) for row in chosen], step)
        weight, written = batch.weight, batch.written
        # every session counts the same, in a short last batch and behind a missing readout too
        sums = torch.stack([(loss * weight).sum(), (measure * weight).sum(), (text * written).sum()])
        learner.backward((sums[0] + rows.text_weight * sums[2]) / task.learner.micro_batch)
        learner.step()
        totals += sums.detach().cpu().double()
        counts += torch.stack([weight.sum(), written.sum()]).cpu().double()
    dist.all_reduce(totals)
    dist.all_reduce(counts)
    loss, measure, text = (totals / counts[[0, 0, 1]].clamp(min=1)).tolist()
    return loss, measure, text


@dataclass(frozen=True)
class MicroBatch:
    """B sessions as `Reader` takes them, with P embeddings each; empty places of a short last batch weigh nothing."""

    inputs: dict[str, Tensor]
    of: Tensor
    places: Tensor
    """[M], of tokens that are read: see `Reader`."""
    counts: Tensor
    """[B, P], how many tokens an embedding is of."""
    weight: Tensor
    """[B, P], what each counts."""
    text: tuple[Tensor, Tensor, Tensor] | None
    """Of selected queries' tokens, if these are asked for: see `Reader`."""
    written: Tensor
    """[B], 1 where a session counts that has a selected query."""


class Rows:
    """The training sessions, as `model` reads them; a batch is a pure function of step and rank."""

    def __init__(self, task: LearnerTask, settings: config.Embedding, model: PreTrainedModel) -> None:
        self.table = storage.read_table(storage.join(task.data, engine.POSITIVES)).sort_by("session_id")
        self.readouts, self.text_weight = settings.readouts, settings.text_weight
        tokenizer = models.load_tokenizer(task.reasoner.model)
        self.stops = stop_tokens(tokenizer)
        self.reasoner = task.reasoner
        self.prefix = len(tokenizer(task.template.prefix, add_special_tokens=False)["input_ids"])
        self.layout = Layout(model, tokenizer.pad_token_id)

    def __len__(self) -> int:
        return self.table.num_rows

    def batch(self, step: int, micro: int, task: LearnerTask, rank: int) -> list[int]:
        """Row numbers of one micro-batch; -1 fills the places that a short last batch leaves empty."""
        size = task.optimisation.batch_sessions
        epoch, place = divmod(step, math.ceil(len(self) / size))
        order = np.random.Generator(np.random.Philox(key=[task.seed, epoch])).permutation(len(self))
        order = np.concatenate([order, np.full(-len(order) % size, -1)])
        start = place * size + (micro * task.learner.ranks + rank) * task.learner.micro_batch
        return order[start : start + task.learner.micro_batch].tolist()

    def micro_batch(self, rows: list[int], device: torch.device) -> MicroBatch:
        """The sessions of some row numbers, -1 for an empty place."""
        sessions = self.table.take(pa.array([max(row, 0) for row in rows])).to_pylist()
        tokens, texts, reads, weights, written = [], [], [], [], []
        for row, session in zip(rows, sessions, strict=True):
            prompt, completion = session["prompt_ids"], session["completion_ids"] or []
            query = [token for token in completion if token not in self.stops]
            asked, wrote = reading.tokens(self.reasoner, self.prefix, len(prompt), len(query))
            read = {"prompt": asked, "query": wrote}
            after = completion if self.text_weight else query if "query" in self.readouts else []
            tokens.append(prompt + after)
            texts.append(range(len(prompt), len(prompt) + len(after)))
            written.append(float(row >= 0 and bool(completion)))
            reads += [read[readout] for readout in self.readouts]
            present = [readout == "prompt" or bool(query) for readout in self.readouts]
            weights.append([(row >= 0) * here / max(sum(present), 1) for here in present])
        laid, each = self.layout(tokens, device), len(self.readouts)

        def told(values: list, dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(values, device=device, dtype=dtype)

        text = None
        if self.text_weight:  # also where none has a query: under ZeRO-3 every worker asks for the same weights
            said = [(row, place) for row, query in enumerate(texts) for place in query]
            text = (
                told([row for row, _ in said], torch.long),
                told([laid.place(row, place - 1) for row, place in said], torch.long),
                told([tokens[row][place] for row, place in said], torch.long),
            )
        return MicroBatch(
            inputs=laid.inputs,
            of=told([number for number, read in enumerate(reads) for _ in read]),
            places=told([laid.place(i // each, token) for i, read in enumerate(reads) for token in read]),
            counts=told([len(read) for read in reads]).view(-1, each),
            weight=told(weights),
            text=text,
            written=told(written),
        )
