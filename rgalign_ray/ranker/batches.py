"""Rows as tensors, batch by batch, and a ranker's scores of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rgalign_ray.ranker.base import Batch, Ranker
from rgalign_ray.ranker.ragged import Index, Ragged, narrow
from rgalign_ray.ranker.rows import LISTS, Rows, ragged

NULL, PROMPT, QUERY = 0, 1, 2
READOUTS = {"null": NULL, "prompt": PROMPT, "query": QUERY}

SCORE_BATCH = 256


def score_rows(model: Ranker, rows: Rows, readout: str, device: str = "cpu", batch: int = SCORE_BATCH) -> np.ndarray:
    """Scores of rows, float32 [n, C] and -inf where candidates are padded, or [sum of counts] of ragged ones.

    A session without e(x,q) is read through e(x), and one without either through the null query.
    """
    reads = available(rows, np.full(len(rows["session_key"]), READOUTS[readout]))

    def score(sessions: Batch, piece: Index) -> Tensor:
        return model(sessions, *query_input(rows, reads, piece, device))

    training = model.training
    model.eval()
    with torch.inference_mode():
        scores = score_pieces(rows, score, device, batch)
    model.train(training)
    return scores


def score_pieces(
    rows: Rows, score: Callable[[Batch, Index], Tensor], device: str = "cpu", batch: int = SCORE_BATCH
) -> np.ndarray:
    """Scores as `score_rows` returns them, by a function of a piece of the rows and what selects it.

    Args:
        score: (sessions as tensors, index of their rows) → [b, C], C the piece's longest list.
        batch: sessions of a piece, at most; pieces with long lists have fewer.
    """
    kept = ragged(rows)
    candidates: Ragged = kept["candidates"]
    scores = np.empty(len(candidates.values), np.float32)
    for start in range(0, len(candidates), batch):
        for piece in narrow(candidates.counts, slice(start, start + batch)):
            sessions = to_batch(take(kept, piece), device)
            found = score(sessions, piece)
            scores[candidates.positions(piece)] = found[sessions["candidates"] >= 0].cpu().numpy()
    if kept is rows:
        return scores
    padded = np.full(rows["candidates"].shape, -np.inf, np.float32)
    padded[rows["candidates"] >= 0] = scores
    return padded


def available(rows: Rows, wanted: np.ndarray) -> np.ndarray:
    """int [n], the readout each session can have where `wanted` [n] is: e(x) stands in for a missing e(x,q), null
    for a missing e(x).
    """
    reads = np.where((wanted == QUERY) & ~rows["has_query"], PROMPT, wanted)
    return np.where((reads == PROMPT) & ~rows["has_prompt"], NULL, reads)


def query_input(rows: Rows, reads: np.ndarray, part: Index, device: str = "cpu") -> tuple[Tensor | None, Tensor]:
    """Embeddings [b, De] and is_null [b] of the rows of `part`, each by its readout; None where there are none."""
    reads = reads[part]
    is_null = torch.from_numpy(reads == NULL).to(device)
    if not rows["prompt"].shape[1]:
        return None, is_null
    chosen = np.where((reads == QUERY)[:, None], rows["query"][part], rows["prompt"][part])
    return torch.from_numpy(chosen.astype(np.float32)).to(device), is_null


def to_batch(rows: Rows, device: str = "cpu") -> Batch:
    """Rows as tensors, padded to the longest of their lists; padded arrays keep their width."""
    arrays = {name: rows[name] for name in ("fields", "multi", "history", *LISTS) if name in rows}
    padded = {name: a.padded() if isinstance(a, Ragged) else np.ascontiguousarray(a) for name, a in arrays.items()}
    return {name: torch.from_numpy(a).to(device) for name, a in padded.items()}


def take(rows: Rows, index: Index) -> Rows:
    """The rows of an index."""
    return {name: values[index] for name, values in rows.items()}
