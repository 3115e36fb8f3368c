"""Rows of tokens that are read in one pass, together or apart, are read as each would be alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgalign_ray import config
from rgalign_ray.learner import token_rows
from rgalign_ray.reasoner import models

CPU = torch.device("cpu")
BEGINNING = [5, 9, 9, 4]


def of(hidden: int = 576, **told: Any) -> Any:
    """A model as far as a layout asks."""
    return SimpleNamespace(
        config=SimpleNamespace(**{"_attn_implementation": "sdpa", "hidden_size": hidden, "sliding_window": None} | told)
    )


@pytest.mark.parametrize("tails", [[[7], [8, 9, 3], [8, 2]], [[7, 8], [7, 8], [7, 8, 6]], [[1, 2, 3]]])
@pytest.mark.parametrize("shared", [None, 0, 2, 4])
def test_states_and_gradients_are_those_of_rows_alone(tails: list[list[int]], shared: int | None) -> None:
    model = models.load_base(config.Reasoner(model="tiny", dtype="float32"))
    assert token_rows.may_share(model)
    rows = [BEGINNING + tail for tail in tails]
    laid = token_rows.apart(rows, 0, CPU) if shared is None else token_rows.together(rows, shared, CPU)
    weights = torch.randn(sum(map(len, rows)), model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def gradient(states: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (states * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = torch.cat([model.model(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows])
    places = [laid.place(row, token) for row, tokens in enumerate(rows) for token in range(len(tokens))]
    states = model.model(**laid.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[torch.tensor(places)]
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(states), gradient(alone), rtol=1e-4, atol=1e-5)


ROWS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5)


@given(rows=ROWS, beginning=st.lists(st.integers(0, 3), max_size=9), at_most=st.integers(0, 9) | st.none())
def test_tokens_are_where_they_are_said_to_be(rows: list[list[int]], beginning: list[int], at_most: int | None) -> None:
    rows = [beginning + row for row in rows]
    laid = token_rows.Layout(of(), pad=0)(rows, CPU, at_most)
    ids, positions = (laid.inputs[name].flatten().tolist() for name in ("input_ids", "position_ids"))
    for row, tokens in enumerate(rows):
        places = [laid.place(row, token) for token in range(len(tokens))]
        assert [ids[place] for place in places] == tokens
        assert [positions[place] for place in places] == list(range(len(tokens)))
    own = [[laid.place(row, token) for token in range(laid.shared, len(tokens))] for row, tokens in enumerate(rows)]
    assert all(own), "each has a token of its own"
    assert len({place for places in own for place in places}) == sum(map(len, own))
    assert at_most is None or laid.shared <= at_most


def test_a_long_beginning_is_read_once() -> None:
    rows = [BEGINNING * 30 + tail for tail in ([7] * 60, [8] * 50, [7] * 55)]
    laid = token_rows.Layout(of(), pad=0)(rows, CPU)
    assert laid.shared == 120 and laid.inputs["input_ids"].shape == (1, 120 + 60 + 50 + 55)
    with_a_limit = token_rows.Layout(of(), pad=0)(rows, CPU, at_most=100)
    assert with_a_limit.inputs["input_ids"].shape == (1, 100 + 80 + 70 + 75)


@pytest.mark.parametrize(("sessions", "hidden", "once"), [(4, 576, True), (64, 576, False), (64, 4096, True)])
def test_where_attention_would_cost_more_than_it_spares_rows_are_read_apart(
    sessions: int, hidden: int, once: bool
) -> None:
    rows = [BEGINNING * 30 + [7 + row] * 200 for row in range(sessions)]
    assert (len(token_rows.Layout(of(hidden), pad=0)(rows, CPU).inputs["input_ids"]) == 1) == once


@pytest.mark.parametrize(
    "told",
    [
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"sliding_window": 4096},
        {"_attn_implementation": "flash_attention_2"},
    ],
)
def test_a_model_that_cannot_be_told_what_a_token_sees_reads_rows_apart(told: dict[str, Any]) -> None:
    rows = [BEGINNING * 30 + [7], BEGINNING * 30 + [8]]
    assert len(token_rows.Layout(of(), pad=0)(rows, CPU).inputs["input_ids"]) == 1
    assert len(token_rows.Layout(of(**told), pad=0)(rows, CPU).inputs["input_ids"]) == 2
