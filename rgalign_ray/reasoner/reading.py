"""What of the LLM's states is an embedding: after which layer, and of which tokens.

  prefix   session text  suffix   query
  p p p p  x x x x x x x s s s    q q q q
           └────── e(x) ─────┘
           └────────── e(x,q) ──────────┘      means of states; or the state of the last token of each

The state of the last token says what comes next more than what was read, and so do the last layers (Skean et al.,
2025): the mean over the text, before the last layers, tells more of what it is about.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from rgalign_ray import config


class Forward(Protocol):
    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, H] of a pass: the last, which tokens are predicted from, and those that are read."""
        ...


def forward(model: PreTrainedModel, settings: config.Reasoner) -> Forward:
    """A model's passes, with the states at `reasoner.depth`: those of one layer, where `output_hidden_states` would
    keep all.
    """
    count = model.config.num_hidden_layers
    layers = next(part for part in model.model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    layer = layers[max(round(settings.depth * count), 1) - 1]

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        if layer is layers[-1]:
            last = model.model(**inputs).last_hidden_state
            return last, last
        read: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, out: read.append(out[0] if isinstance(out, tuple) else out))
        try:
            last = model.model(**inputs).last_hidden_state
        finally:
            hook.remove()
        return last, read[0]

    return run


def tokens(settings: config.Reasoner, prefix: int, prompt: int, query: int) -> tuple[range, range]:
    """Which tokens of a row e(x) and e(x,q) are of.

    Args:
        prefix, prompt: tokens of the instruction, and of the whole prompt with it.
        query: tokens of the query behind it, without what ends it.
    """
    e_x, e_xq = range(prefix, prompt), range(prefix, prompt + query)
    return (e_x, e_xq) if settings.pooling == "mean" else (e_x[-1:], e_xq[-1:])
