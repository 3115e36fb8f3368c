"""Training of one ranker by a group of workers that each hold a part of the sessions.

Which sessions form a step is a function of (seed, epoch, session id), so it does not matter which worker
holds which session, how many each holds, or how many workers there are:

    order of an epoch   = session ids sorted by a hash of (seed, epoch, id)
    global batch b      = places b·batch … (b+1)·batch of that order; a worker takes those it holds
    gradient            = Σ over workers of the gradient of (Σ of its sessions' losses) / (size of the batch)

Nothing is dropped: the last batch is smaller, and a worker that holds none of a batch adds zero.
Repeated with the same workers holding the same sessions, in whatever order they came, results on CPUs are equal
to the bit. With another number of workers only the order of float additions differs, provided dropout is 0:
dropout masks are drawn per worker (the intents whose id is hidden are drawn alike by all).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.hashing import mixed, uniform
from rgalign_ray.logs import lists
from rgalign_ray.metrics import GroupAuc, group_auc
from rgalign_ray.ranker import losses
from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.batches import READOUTS, available, query_input, score_rows, take, to_batch
from rgalign_ray.ranker.group import Group
from rgalign_ray.ranker.likeliest import likeliest_weight
from rgalign_ray.ranker.models import MODELS
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.ragged import Ragged, narrow
from rgalign_ray.ranker.rows import LISTS, Rows, ragged
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.text_match import FIT_SESSIONS, TextMatch
from rgalign_ray.ranker.whitening import Moments

SHOWN_WEIGHTS = (0.05, 2.0)
"""The least and the most that towers may weigh beside the match of texts, where intents are ranked."""


@dataclass
class Progress:
    """Where training stands; together with model and optimiser all that a resumed run needs."""

    epoch: int = 0
    """Epochs that are over."""
    best_epoch: int = 0
    best_gauc: float = -1.0
    losses: list[float] = field(default_factory=list)
    """Mean training loss per session of each epoch."""
    gaucs: list[float] = field(default_factory=list)
    """Validation GAUC after each epoch, read through the prompt."""


class Fit:
    """One ranker in training.

    Args:
        start: state dict of a ranker of the same kind and sizes to begin with (a warm start), its base rates and
            whitening included, centred anew, and to keep unless validation prefers what was learned since; None begins
            with initial weights drawn by `seed`.
        margin: standard errors by which validation must prefer it. An epoch that is better by chance is easily found,
            and undoes what a reasoner has learned from the ranker that it began with.

    Raises:
        DataError: when there is no session to learn from, or none with a click and a non-click to choose
            the epoch by.
    """

    def __init__(
        self,
        kind: str,
        sizes: Sizes,
        settings: config.Ranker,
        rows: Rows,
        items: np.ndarray | None,
        seed: int,
        group: Group,
        device: str = "cpu",
        start: dict[str, Tensor] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.settings, self.seed, self.group, self.device = settings, seed, group, device
        rows = take(ragged(rows), np.argsort(rows["session_key"], kind="stable"))
        valid = rows["valid"]
        self.train, self.valid = take(rows, ~valid), take(rows, valid)
        self.keys = np.sort(group.concatenate(self.train["session_key"]))
        self.counts = group.sum(_counts(self.train, self.valid)).astype(int)
        _check(self.counts)
        _manual_seed(seed, "init")
        self.model = MODELS[kind](sizes, settings)
        if start is None:
            self._statistics(items)
        else:
            self.model.load_state_dict(start)
            self._recentre(items)
        group.same_(self.model)
        self.start, self.margin = _copy(self.model) if start else None, margin
        self.agrees = isinstance(self.model, QERec) and settings.kl != "off"
        self.train = self._with_a_part(self.train)
        self.model.to(device)
        self.gradients = _flat_gradients(self.model)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.model, settings))
        self.average = _averaged(self.model, settings.average)
        self.progress = Progress()
        self.best = _copy(self.model)
        self.after_step: Callable[[], None] = lambda: None

    def run(self, after_epoch: Callable[[Fit], None] = lambda fit: None) -> dict[str, Any]:
        """Trains to the end, keeps the best epoch's weights, and returns the figures."""
        if self.start and self.progress.epoch == 0:
            self.progress.best_gauc = self.validation_gauc("prompt")
        while not self.finished:
            loss = self._epoch(self.progress.epoch)
            gauc = self.validation_gauc("prompt")
            self.progress.epoch += 1
            self.progress.losses.append(loss)
            self.progress.gaucs.append(gauc)
            if gauc > self.progress.best_gauc:
                self.progress.best_gauc, self.progress.best_epoch = gauc, self.progress.epoch
                self.best = _copy(self.judged)
            after_epoch(self)
        self.average = None
        self.model.load_state_dict(self.best)
        if not self.gradients.numel():
            self.progress.best_gauc = self.validation_gauc("prompt")
        defended = self._defended(self.start) if self.start and self.progress.best_epoch else {}
        if self.model.match and self.model.match.dim and self.model.trained:
            self._weigh_among_shown(self.model, self.model.match)
        return self._figures() | self._among_shown() | defended

    @property
    def judged(self) -> Ranker:
        """What validation judges: the average where there is one, else the model in training."""
        return self.average.module if self.average else self.model

    @property
    def finished(self) -> bool:
        stale = self.progress.epoch - self.progress.best_epoch
        done = self.progress.epoch >= self.settings.epochs or stale >= self.settings.patience
        return done or not self.gradients.numel()

    def state(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from `state` as if training had not been interrupted."""
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def validation_gauc(self, readout: str) -> float:
        """GAUC over all candidates of the validation sessions, the session being the group."""
        found = self._validation_auc(readout)
        return self._mean(found.auc, found.weight)

    def _validation_auc(self, readout: str) -> GroupAuc:
        """Of this worker's validation sessions."""
        scores = score_rows(self.judged, self.valid, readout, self.device)
        clicks = self.valid["clicks"]
        return group_auc(scores, clicks.values, lists.rows(clicks.counts))

    def _among_shown(self) -> dict[str, float]:
        """GAUC of the validation sessions among what was shown, ranked as a shop should; of no session, none."""
        self.model.rank()
        scores = score_rows(self.model, self.valid, "prompt", self.device)
        self.model.tower_weight = 1.0
        clicks, shown = self.valid["clicks"], self.valid["shown"].values
        found = group_auc(scores[shown], clicks.values[shown], lists.rows(clicks.counts)[shown])
        some = self.group.sum(np.array([found.weight.sum()]))[0] > 0
        return {"gauc_shown": self._mean(found.auc, found.weight)} if some else {}

    def _mean(self, values: np.ndarray, weights: np.ndarray) -> float:
        """Over all workers' sessions."""
        total = self.group.sum(np.array([(values * weights).sum(), weights.sum()]))
        return float(total[0] / total[1])

    def _defended(self, start: dict[str, Tensor]) -> dict[str, Any]:
        """Goes back to the start unless validation prefers what was learned, and tells by how much it does, paired by
        session.
        """
        learned = self._validation_auc("prompt")
        self.model.load_state_dict(start)
        began = self._validation_auc("prompt")
        gain, weight = learned.auc - began.auc, began.weight
        mean = self._mean(gain, weight)
        squares, total = self.group.sum(np.array([((weight * (gain - mean)) ** 2).sum(), weight.sum()]))
        error = math.sqrt(squares) / total
        if mean > self.margin * error:
            self.model.load_state_dict(self.best)
        else:
            self.progress.best_epoch, self.progress.best_gauc = 0, self._mean(began.auc, weight)
        return {"over_start": {"gauc": mean, "standard_error": float(error)}}

    def _statistics(self, items: np.ndarray | None) -> None:
        """Base rates, seen intents and whitening, from the training sessions of all workers."""
        model, size = self.model, self.model.sizes.num_intents
        candidates = self.train["candidates"].values
        chosen = (candidates[self.train[name].values] for name in ("clicks", "shown"))
        clicks, shown = self.group.sum(np.stack([np.bincount(intents, minlength=size) for intents in chosen]))
        seen = shown > 0
        prior = np.log(clicks + 1.0) - np.log(clicks.sum() + size)
        prior[~seen] = prior[seen].mean()
        model.prior.copy_(torch.from_numpy(prior))
        model.seen.copy_(torch.from_numpy(seen))
        if items is not None and model.reads_text:
            model.item_tower.set_text(items)
        if model.reads_queries:
            prompt, query = self._moments()
            model.fit_queries(prompt, query)
            if model.match and model.match.dim and items is not None:
                model.match.fit(items, prompt, query)
                if model.trained:
                    self._begin_match(model.match)

    def _recentre(self, items: np.ndarray | None) -> None:
        """Has a ranker read what a reasoner that it does not know says of a session beyond what that says of every one.

        An objective asks its judge's towers too for what they lack of the log, which is much the same for all sessions:
        a shift of the reasoner's mean, which the ranker would take for something that the session tells.
        """
        if not self.model.reads_queries:
            return
        prompt, query = self._moments()
        self.model.query_tower.whitening.recentre(prompt + query)
        if self.model.match and self.model.match.dim and items is not None:
            self.model.match.fit(items, prompt, query)

    def _moments(self) -> tuple[Moments, Moments]:
        """Of the e(x) and the e(x,q) of all workers' training sessions."""
        own = [Moments.of(self.train[name][self.train[f"has_{name}"]]) for name in ("prompt", "query")]
        dim = self.model.sizes.embedding_dim
        prompt, query = (Moments.from_flat(self.group.sum(it.flat()), dim) for it in own)
        return prompt, query

    def _begin_match(self, match: TextMatch) -> None:
        """Begins the weight of the texts' match where it and the base rates make this log's clicks likeliest."""
        model = self.model
        clicked = (self.train["clicks"].sums() > 0) & self.train["has_prompt"]
        share = FIT_SESSIONS / max(self.group.sum(np.array([clicked.sum()]))[0], 1)
        clicked &= uniform(self.train["session_key"], self.seed, "match") < share
        rows = take(self.train, np.flatnonzero(clicked))
        batch = to_batch(rows)
        candidates = batch["candidates"].clamp(min=0).long()
        mask = (batch["candidates"] >= 0) & model.seen[candidates]
        clicks = batch["clicks"] & mask
        logits = model.prior[candidates].masked_fill(~mask, -torch.inf)
        told = clicks.any(dim=-1)
        target = clicks / clicks.sum(dim=-1, keepdim=True).clamp(min=1)
        embedding = torch.from_numpy(rows["prompt"])
        match.fit_weight(embedding[told], logits[told], candidates[told], target[told], self.group)

    def _weigh_among_shown(self, model: Ranker, match: TextMatch) -> None:
        """What all but the match weighs where the validation sessions' clicks are likeliest among what was shown.

        Validation tells it without bias: what towers say of sessions that they have learned from is too good.
        """
        whole, gate = score_rows(model, self.valid, "prompt", self.device), match.gate.detach().clone()
        with torch.no_grad():
            match.gate.zero_()
            towers = score_rows(model, self.valid, "prompt", self.device)
            match.gate.copy_(gate)
        clicks, shown = self.valid["clicks"], self.valid["shown"].values
        told = np.flatnonzero((clicks.sums() > 0) & self.valid["has_prompt"])

        def among(values: np.ndarray, fill: float) -> Tensor:
            return torch.from_numpy(Ragged(values, clicks.counts, fill).where(shown)[told].padded())

        target = among(clicks.values.astype(np.float32), 0.0)
        target = target / target.sum(dim=-1, keepdim=True)
        texts, rest = among(whole - towers, -np.inf), among(towers, 0.0)
        model.shown_weight.fill_(likeliest_weight(texts, rest, target, self.group, SHOWN_WEIGHTS, near=1.0))

    def _with_a_part(self, rows: Rows) -> Rows:
        """Ragged rows without the candidates that no loss reads: where nothing was clicked, those that were not shown.

        The KL term reads all of a session that has a query.
        """
        read = rows["clicks"].sums() > 0
        if self.agrees:
            read |= rows["has_prompt"] | rows["has_query"]
        keep = np.repeat(read, rows["clicks"].counts) | rows["shown"].values
        return rows | {name: rows[name].where(keep) for name in LISTS}

    def _epoch(self, epoch: int) -> float:
        size = self.settings.batch_sessions
        place = _places(self.keys, self.train["session_key"], self.seed, epoch)
        order = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[order], np.arange(0, len(self.keys) + size, size))
        rows = take(self.train, order)
        reads = self._readouts(rows, epoch)
        total = torch.zeros(1, dtype=torch.float64)
        self.model.train()
        for step, (start, end) in enumerate(pairwise(bounds)):
            sessions = min(size, len(self.keys) - step * size)
            total += self._step(rows, reads, slice(start, end), (epoch, step), sessions)
            self.after_step()
        return float(self.group.add_(total)) / len(self.keys)

    def _step(self, rows: Rows, reads: np.ndarray, part: slice, at: tuple[int, int], sessions: int) -> float:
        """One optimiser step on a global batch of `sessions` sessions; returns this worker's summed loss."""
        self.gradients.zero_()
        loss = 0.0
        for number, piece in enumerate(narrow(rows["candidates"].counts, part)):
            batch = to_batch(take(rows, piece), self.device)
            embedding, is_null = query_input(rows, reads, piece, self.device)
            summed = self._loss(batch, embedding, is_null, at, number)
            (summed / sessions).backward()
            loss += float(summed.detach())
        self.group.add_(self.gradients)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        return loss

    def _loss(
        self, batch: Batch, embedding: Tensor | None, is_null: Tensor, at: tuple[int, int], number: int
    ) -> Tensor:
        """Summed loss of piece `number` of this worker's batch.

        Candidates that training never showed take no part: they could not be clicked.
        """
        model, settings = self.model, self.settings
        candidates = batch["candidates"].clamp(min=0).long()
        mask = (batch["candidates"] >= 0) & model.seen[candidates]
        _manual_seed(self.seed, "items", *at)
        items = model.items()
        _manual_seed(self.seed, "sessions", *at, self.group.rank + number * self.group.size)
        u = model.users(batch)
        z = model.queries(embedding, is_null) if model.reads_queries else None
        scores = model.score(u, items, candidates, z)
        loss = losses.listnet(scores, batch["clicks"], mask)
        no_click = losses.pointwise(scores, batch["shown"], batch["clicks"], mask)
        loss = loss + settings.no_click_weight * no_click
        if self.agrees:
            student = model.query_logits(z, items).gather(1, candidates)
            teacher = scores if settings.kl == "fused" else model.user_logits(u, items).gather(1, candidates)
            loss = loss + settings.kl_weight * losses.agreement(teacher, student, mask, is_null)
        return loss

    def _readouts(self, rows: Rows, epoch: int) -> np.ndarray:
        share = self.settings.query_input
        drawn = uniform(rows["session_key"], self.seed, f"readout/{epoch}")
        wanted = np.digitize(drawn, [share.no_query, share.no_query + share.prompt])
        return available(rows, wanted)

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = dict(zip(COUNTS, self.counts.tolist(), strict=True))
        figures |= asdict(self.progress)
        figures["parameters"] = sum(p.numel() for p in self.model.parameters())
        figures["intents_shown"] = int(self.model.seen.sum())
        if self.model.reads_queries:
            if self.model.match and self.model.match.dim:
                figures["text_match"] = float(self.model.match.weight.detach())
                figures["shown_weight"] = float(self.model.shown_weight)
            if self.model.trained:
                figures["gate"] = float(self.model.query_tower.gate.detach().abs().mean())
            figures["gauc_by_readout"] = {name: self.validation_gauc(name) for name in READOUTS}
        return figures


def _averaged(model: Ranker, power: float | None) -> AveragedModel | None:
    """Averages as `config.Ranker.average` says."""
    if power is None:
        return None

    def update(mean: list[Tensor], new: list[Tensor], steps: Tensor | int) -> None:
        torch._foreach_lerp_(mean, new, (power + 1) / (float(steps) + 1 + power))

    return AveragedModel(model, multi_avg_fn=update)


def _places(all_keys: np.ndarray, keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The place of each of `keys` in the epoch's order of `all_keys`."""
    return np.searchsorted(np.sort(mixed(all_keys, seed, f"order/{epoch}")), mixed(keys, seed, f"order/{epoch}"))


def _manual_seed(seed: int, *purpose: Any) -> None:
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _copy(model: Ranker) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _flat_gradients(model: Ranker) -> Tensor:
    """One buffer whose slices are the parameters' gradients, so that workers add them in one call."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=model.prior.device)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat


def _parameter_groups(model: Ranker, settings: config.Ranker) -> list[dict[str, Any]]:
    """Gates learn faster than the rest and do not decay: they must be able to open."""
    gates = [p for name, p in model.named_parameters() if name.endswith(".gate")]
    rest = [p for name, p in model.named_parameters() if not name.endswith(".gate")]
    groups = [{"params": rest, "lr": settings.lr, "weight_decay": settings.weight_decay}]
    if gates:
        groups.append({"params": gates, "lr": settings.lr * settings.gate_lr_scale, "weight_decay": 0.0})
    return groups


COUNTS = (
    "sessions",
    "sessions_with_click",
    "sessions_without_click",
    "sessions_with_prompt",
    "sessions_with_query",
    "validation_sessions",
    "validation_sessions_ranked",
)


def _counts(train: Rows, valid: Rows) -> np.ndarray:
    clicked, chosen = train["clicks"].sums() > 0, valid["clicks"].sums()
    ranked = (chosen > 0) & (chosen < valid["clicks"].counts)
    sessions, with_click = len(clicked), clicked.sum()
    train_counts = [sessions, with_click, sessions - with_click, train["has_prompt"].sum(), train["has_query"].sum()]
    return np.array([*train_counts, len(ranked), ranked.sum()])


def _check(counts: np.ndarray) -> None:
    figures = dict(zip(COUNTS, counts.tolist(), strict=True))
    if not figures["sessions_with_click"]:
        raise DataError(f"role rank: {figures['sessions']} sessions, none with a click to learn from.")
    if not figures["validation_sessions_ranked"]:
        raise DataError(
            f"role valid: {figures['validation_sessions']} sessions, none with both clicked and unclicked "
            "candidates; raise roles.valid or the number of sessions."
        )
