"""What N samples of each prompt go on from: the prompts' keys and values, read once for all N of them.

  one decoding step, per layer       prompt [B, T]  ◀── one matrix product for the N rows of a prompt ──┐
                                                                                              rows [B·N, 1]
                                     own tokens [B·N, steps], written in place  ◀── one product a row ──┘

A cache that is fanned out instead holds every prompt N times, reads it N times a step, and copies all of it to
append one token. That remains the way for models whose attention is more than a softmax over what came before.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from rgalign_ray.reasoner.reading import Forward

ATTENTION = "rgalign_shared_prompt"
SHARING = ("llama", "qwen2", "qwen3")
"""Model types whose attention `attend` computes: a softmax over all that came before, and nothing else."""
FULL = 0.75
"""Share of places in use below which rows are put together anew: that copies what they hold."""


class Continuation(Protocol):
    """Rows that are decoded together, N for each prompt; those that are finished leave."""

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both states [R, H] of one more token of each row, int [R], as `Forward` has them."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows alone, int [R'], ascending."""
        ...


def of(model: PreTrainedModel, forward: Forward, cache: DynamicCache, mask: Tensor, n: int, steps: int) -> Continuation:
    """The continuation of prompts [B, T] that are in `cache`, with their mask, n rows each, for so many steps."""
    sliding = any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or ())
    if model.config.model_type in SHARING and not sliding:
        return SharedPrompts(model, forward, cache, mask, n, steps)
    return FannedOut(forward, cache, mask, n)


class SharedPrompts:
    """Arguments as those of `of`. Places stand in a grid [B, N]; what has no row in it is computed and forgotten."""

    def __init__(
        self, model: PreTrainedModel, forward: Forward, cache: DynamicCache, mask: Tensor, n: int, steps: int
    ) -> None:
        self.config, self.forward = model.config, forward
        self.prompts = [(layer.keys, layer.values) for layer in cache.layers]
        keys = self.prompts[0][0]
        self.grid = (len(keys), n)
        self.bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        self.bias.masked_fill_(mask == 0, -torch.inf)
        self.lengths = mask.sum(dim=1)
        shape = (len(keys) * n, keys.shape[1], steps, keys.shape[3])
        self.own = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in self.prompts]
        self.done = 0
        self.places = torch.arange(len(keys) * n, device=mask.device)
        """Place of each row in the grid."""

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        batch, n = self.grid
        filled = tokens.new_zeros(batch * n)
        filled[self.places] = tokens
        positions = (self.lengths + self.done)[:, None].expand(batch, n).reshape(-1, 1)
        before, self.config._attn_implementation = self.config._attn_implementation, ATTENTION
        try:
            last, read = self.forward(
                input_ids=filled[:, None], position_ids=positions, past_key_values=self, use_cache=True, rows=self
            )
        finally:
            self.config._attn_implementation = before
        self.done += 1
        return last[self.places, -1], read[self.places, -1]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the model: takes the new token's [B·N, Hkv, 1, D], gives those of all own tokens."""
        for old, new in zip(self.own[layer], (keys, values), strict=True):
            old[:, :, self.done : self.done + 1] = new
        own_keys, own_values = self.own[layer]
        return own_keys[:, :, : self.done + 1], own_values[:, :, : self.done + 1]

    def keep(self, rows: Tensor) -> None:
        self.places = self.places[rows]
        prompt = self.places // self.grid[1]
        there, counts = torch.unique_consecutive(prompt, return_counts=True)
        grid = (len(there), int(counts.max()))
        if grid[0] * grid[1] > FULL * self.grid[0] * self.grid[1]:
            return
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = torch.arange(len(there), device=rows.device).repeat_interleave(counts) * grid[1]
        places = places + torch.arange(len(rows), device=rows.device) - first
        source = self.places.new_zeros(grid[0] * grid[1])
        source[places] = self.places
        self.own = [(keys[source], values[source]) for keys, values in self.own]
        if len(there) < self.grid[0]:
            self.prompts = [(keys[there], values[there]) for keys, values in self.prompts]
            self.bias, self.lengths = self.bias[there], self.lengths[there]
        self.grid, self.places = grid, places


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    rows: SharedPrompts,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a row to its prompt and to its own tokens: one softmax over both.

    Args:
        query: [B·N, heads, 1, D].
        key, value: of own tokens, [B·N, Hkv, S, D].
        rows: holds the prompts' keys and values [B, Hkv, T, D] of every layer.

    Returns:
        [B·N, 1, heads, D], as transformers asks for it, and no weights.
    """
    keys, values = rows.prompts[module.layer_idx]
    batch, shared, length, width = keys.shape
    n, group = rows.grid[1], query.shape[1] // shared
    own = key.shape[2]

    def by_prompt(each: Tensor) -> Tensor:  # [B·N, Hkv, group, X] → [B·Hkv, N·group, X]
        return each.reshape(batch, n, shared, group, -1).transpose(1, 2).reshape(batch * shared, n * group, -1)

    def by_row(each: Tensor) -> Tensor:  # and back, with rows and heads in one: [B·N·Hkv, group, X]
        return each.reshape(batch, shared, n, group, -1).transpose(1, 2).reshape(batch * n * shared, group, -1)

    asked = query.reshape(batch * n, shared, group, width)
    scores = torch.cat(
        [
            by_prompt(asked) @ keys.flatten(0, 1).transpose(1, 2),
            by_prompt(asked.flatten(0, 1) @ key.flatten(0, 1).transpose(1, 2)),
        ],
        dim=-1,
    ).float()
    scores = scores.mul_(scaling).view(batch, -1, length + own)
    scores[..., :length] += rows.bias[:, None]
    weights = scores.softmax(dim=-1).to(query.dtype).view(batch * shared, n * group, -1)
    read = by_row(weights[..., :length] @ values.flatten(0, 1))
    read = read + by_row(weights[..., length:]) @ value.flatten(0, 1)
    return read.reshape(batch * n, 1, shared * group, width), None


AttentionInterface.register(ATTENTION, attend)


class FannedOut:
    """Every row holds its prompt, in a cache of transformers' own."""

    def __init__(self, forward: Forward, cache: DynamicCache, mask: Tensor, n: int) -> None:
        self.forward, self.cache = forward, cache
        cache.batch_repeat_interleave(n)
        self.mask = mask.repeat_interleave(n, dim=0)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        last, read = self.forward(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return last[:, -1], read[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
