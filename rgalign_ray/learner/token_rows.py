"""Rows of tokens for one forward pass of the LLM; what all of them begin with is read once.

  apart, each padded:  p p p a a a      together:  p p p a a a b b     each token sees the beginning and
                       p p p b b .                                     its own row, as it does apart

The instruction and its examples in front of a session's text are longer than most texts, so a pass over the rows
together costs half or less, in memory too. It is exact: positions and what a token sees are those of the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenRows:
    """What the model takes, and where in its output the rows' tokens are."""

    inputs: dict[str, Tensor]
    """input_ids, position_ids [R, T]; attention_mask [R, T], or of rows that are one a bool [1, 1, T, T]."""
    shared: int
    """Tokens that are in the pass once."""
    starts: list[int]
    """Of each row, where the first token that is its own lies, in the pass's tokens one after another."""

    def place(self, row: int, token: int) -> int:
        """Where a row's token lies, in the pass's tokens one after another."""
        return token if token < self.shared else self.starts[row] + token - self.shared


class Layout:
    """Lays rows out for a model: together where it can read them so and that is less work, else apart.

    Args:
        pad: the padding token of rows apart.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.pad, self.hidden, self.may_share = pad, model.config.hidden_size, may_share(model)

    def __call__(self, rows: Sequence[Sequence[int]], device: torch.device, at_most: int | None = None) -> TokenRows:
        """The rows of one pass.

        Args:
            at_most: how many tokens they may share; all but the last of the shortest unless said.
        """
        shared = alike(rows) if at_most is None else min(alike(rows), at_most)
        if self.may_share and pays(list(map(len, rows)), shared, self.hidden):
            return together(rows, shared, device)
        return apart(rows, self.pad, device)


def may_share(model: PreTrainedModel) -> bool:
    """Whether the model can be told what each token sees: in every layer attention to all that precedes, as PyTorch
    computes it. State spaces, windows and attention kernels of other make cannot.
    """
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    whole = set(kinds) == {"full_attention"} and not getattr(model.config, "sliding_window", None)
    return whole and model.config._attn_implementation == "sdpa"


def alike(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; the last of the shortest row is none of them."""
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False)))
    return min(same, min(map(len, rows)) - 1)


def pays(lengths: Sequence[int], shared: int, hidden: int) -> bool:
    """Whether rows of these lengths are less work together.

    Attention leaves out nothing that a mask hides, and so grows with the square of the pass's length: a transformer's
    layer takes some 24 H² operations a token, and 4 H for each that the token is held against (Kaplan et al., 2020).
    """

    def work(rows: int, width: int) -> int:
        return rows * width * (6 * hidden + width)

    return work(1, sum(lengths) - (len(lengths) - 1) * shared) < work(len(lengths), max(lengths))


def together(rows: Sequence[Sequence[int]], shared: int, device: torch.device) -> TokenRows:
    """All rows as one, with their first `shared` tokens, which are the same, once."""
    lengths = [len(row) - shared for row in rows]
    total = shared + sum(lengths)
    owner = torch.repeat_interleave(torch.arange(-1, len(rows)), torch.tensor([shared, *lengths]))
    ids = [*rows[0][:shared], *(token for row in rows for token in row[shared:])]
    positions = [*range(shared), *(place for row in rows for place in range(shared, len(row)))]
    mine = (owner[:, None] == owner) | (owner == -1)
    return TokenRows(
        {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": (mine & torch.ones(total, total, dtype=torch.bool).tril())[None, None].to(device),
            "position_ids": torch.tensor([positions], device=device),
        },
        shared,
        (shared + torch.tensor([0, *lengths]).cumsum(0)[:-1]).tolist(),
    )


def apart(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> TokenRows:
    """A row each, padded to the longest behind its end, where nothing sees it."""
    width = max(map(len, rows))
    return TokenRows(
        {
            "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
            "position_ids": torch.arange(width, device=device).expand(len(rows), -1),
        },
        0,
        [width * row for row in range(len(rows))],
    )
