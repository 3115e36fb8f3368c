"""Samples that share their prompt's keys and values get the hidden states of those that hold it each for itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgalign_ray import config
from rgalign_ray.reasoner import continuation, reading
from rgalign_ray.reasoner.continuation import FannedOut, SharedPrompts

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1], [1, 0, 1, 1, 1]])
"""Padding between the shared instruction and the session's own text."""
N, STEPS = 3, 6


def llama(**settings: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


def qwen3(**settings: object) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **settings))


def forward(model: PreTrainedModel) -> reading.Forward:
    return reading.forward(model, config.Reasoner(depth=0.5))


def prefilled(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    tokens = torch.randint(50, MASK.shape, generator=torch.Generator().manual_seed(1))
    positions = (MASK.cumsum(dim=1) - 1).clamp(min=0)
    model.model(input_ids=tokens, attention_mask=MASK, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


def decode(rows: continuation.Continuation, keeps: dict[int, list[int]]) -> list[Tensor]:
    """Both hidden states of every step; before step s only `keeps[s]` of the rows go on. A row's tokens are its own."""
    alive = torch.arange(len(MASK) * N)
    states = []
    for step in range(STEPS):
        if step in keeps:
            kept = torch.tensor(keeps[step])
            alive = alive[kept]
            rows.keep(kept)
        states += rows.step((alive * 7 + step * 3) % 50)
    return states


@pytest.mark.parametrize("make", [llama, qwen3])
@pytest.mark.parametrize(
    "keeps",
    [
        {},
        {1: [0, 1, 2, 3, 5, 6, 7, 8], 3: [0, 3, 4, 5]},  # a few leave; then most
        {2: [0, 1, 2, 6, 7, 8], 4: [1, 5]},  # a prompt's rows all leave, then all but one of the others
        {1: [8], 5: [0]},
    ],
)
@torch.inference_mode()
def test_sharing_changes_no_hidden_state(make: Callable[[], PreTrainedModel], keeps: dict[int, list[int]]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("sdpa")
    shared = continuation.of(model, forward(model), prefilled(model), MASK, N, STEPS)
    assert isinstance(shared, SharedPrompts)
    fanned_out = FannedOut(forward(model), prefilled(model), MASK, N)
    for mine, expected in zip(decode(shared, keeps), decode(fanned_out, keeps), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa", "what else is asked of the model is computed as before"


@torch.inference_mode()
def test_rows_that_have_left_are_computed_no_more() -> None:
    model = llama().eval()
    rows = SharedPrompts(model, forward(model), prefilled(model), MASK, N, STEPS)
    computed: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: computed.append(len(args[0])))
    decode(rows, {1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 1, 6, 7], 3: [1]})
    assert computed == [9, 9, 4, 1, 1, 1], "one place that is empty is not worth a copy of all others"


@pytest.mark.parametrize("make", [llama, qwen3])
def test_attention_that_is_not_over_all_that_came_before_is_not_shared(make: Callable[..., PreTrainedModel]) -> None:
    sliding = qwen3(layer_types=["sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=4)
    assert isinstance(continuation.of(sliding, forward(sliding), prefilled(sliding), MASK, N, STEPS), FannedOut)
    other = make()
    other.config.model_type = "another"
    assert isinstance(continuation.of(other, forward(other), prefilled(other), MASK, N, STEPS), FannedOut)
