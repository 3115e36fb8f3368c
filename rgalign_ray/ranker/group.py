"""The workers that train one model together, or a single process on its own."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Sums over all workers. Alone, where torch.distributed has not been started, every sum is its input."""

    def __init__(self) -> None:
        self.joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.joined else 0
        self.size = dist.get_world_size() if self.joined else 1

    def add_(self, values: Tensor) -> Tensor:
        """Replaces `values` by their sum over the workers."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the workers in float64."""
        return self.add_(torch.tensor(np.asarray(values, dtype=np.float64))).numpy()

    def concatenate(self, values: np.ndarray) -> np.ndarray:
        """All workers' int64 arrays, one after another by rank; their lengths may differ."""
        if not self.joined:
            return values
        lengths = self.sum(np.eye(self.size)[self.rank] * len(values)).astype(np.int64)
        padded = torch.zeros(int(lengths.max()), dtype=torch.int64)
        padded[: len(values)] = torch.from_numpy(np.array(values))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return np.concatenate([part.numpy()[:n] for part, n in zip(parts, lengths, strict=True)])

    def same_(self, module: torch.nn.Module) -> None:
        """Gives every worker the parameters and buffers of rank 0."""
        if self.joined:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)


def pack(state: dict) -> bytes:
    """A state of tensors and plain values as bytes, private to the run that wrote it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> dict:
    """Its tensors lie in main memory, whatever device the one who packed them had."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
