"""A plan is a stable sort of the pairs by expert, whatever the routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_moe.kernels import DispatchPlan


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(0, 20))
    row = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    return torch.tensor(rows, dtype=torch.int64).reshape(num_tokens, top_k), num_experts


@given(routings())
@settings(deadline=None, max_examples=100)
def test_rows_are_the_pairs_sorted_by_expert_and_then_by_pair(routing: tuple[torch.Tensor, int]) -> None:
    index, plan = routing[0], DispatchPlan.from_index(*routing)
    pairs = plan.pair_of_row.tolist()
    assert pairs == sorted(range(index.numel()), key=lambda pair: (index.flatten()[pair].item(), pair))
    assert plan.row_of_pair.shape == index.shape
    assert torch.equal(plan.row_of_pair.flatten()[plan.pair_of_row], torch.arange(index.numel()))
    assert torch.equal(plan.token_of_row, plan.pair_of_row // plan.top_k)


@given(routings())
@settings(deadline=None, max_examples=60)
def test_expert_load_counts_the_pairs(routing: tuple[torch.Tensor, int]) -> None:
    index, num_experts = routing
    plan = DispatchPlan.from_index(index, num_experts)
    expected = [index.flatten().tolist().count(expert) for expert in range(num_experts)]
    assert plan.expert_load.tolist() == expected
    assert plan.row_ends.dtype == torch.int32
    assert plan.row_ends.tolist() == torch.tensor(expected).cumsum(0).tolist()


def test_making_a_plan_sorts_nothing() -> None:
    plan = DispatchPlan.from_index(torch.zeros(4, 2, dtype=torch.int64), 3)
    assert set(vars(plan)) == {"example_index", "num_experts", "tokens_per_example", "derived"}


def test_the_sort_happens_once() -> None:
    plan = DispatchPlan.from_index(torch.tensor([[1], [0]]), 2)
    assert plan.pair_of_row is plan.pair_of_row


def test_more_experts_than_a_short_integer_holds_are_sorted_too() -> None:
    plan = DispatchPlan.from_index(torch.tensor([[40_000], [3]]), 50_000)
    assert plan.pair_of_row.tolist() == [1, 0]


@pytest.mark.parametrize("index", [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2)], ids=["flat", "float"])
def test_an_index_of_the_wrong_kind_is_refused_with_advice(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"int64 tensor of shape \(tokens, top_k\).*reshape"):
        DispatchPlan.from_index(index, 3)


def test_a_plan_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="num_experts >= 1, but got 0"):
        DispatchPlan.from_index(torch.zeros(4, 2, dtype=torch.int64), 0)


@given(routings(), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_every_token_of_an_example_goes_where_the_example_goes(
    routing: tuple[torch.Tensor, int], tokens_per_example: int
) -> None:
    index, num_experts = routing
    plan = DispatchPlan.from_index(index, num_experts, tokens_per_example=tokens_per_example)
    expected = [row for row in index.tolist() for _ in range(tokens_per_example)]
    assert plan.num_examples == len(index) and plan.num_tokens == len(expected)
    assert plan.top_k_index.tolist() == expected


def test_an_example_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_example >= 1, but got 0"):
        DispatchPlan.from_index(torch.zeros(4, 2, dtype=torch.int64), 3, tokens_per_example=0)
