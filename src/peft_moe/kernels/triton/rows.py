"""The order in which the programs see the (token, slot) pairs of a plan."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan import DispatchPlan


class Sorted(NamedTuple):
    """The pairs sorted by slot, then by expert; tokens of one slot and expert keep their order.

    Args:
        token_of_row (`torch.Tensor` of shape `(N,)`, int32): row → token; rows of slot k are k·T .. (k+1)·T - 1.
        segment_end (`torch.Tensor` of shape `(K·E,)`, int32): where the rows of each slot and expert end.
    """

    token_of_row: torch.Tensor
    segment_end: torch.Tensor


class Rows(NamedTuple):
    """Which pair is which row of what the programs keep in rank space.

    Args:
        index_BK (`torch.Tensor` of shape `(B, K)`, int64): the experts of each example.
        tokens_per_example, num_experts (`int`): S, E.
        order (`Sorted`, *optional*): the order of the rows; `None` leaves pair (t, k) in row t·K + k.
    """

    index_BK: torch.Tensor
    tokens_per_example: int
    num_experts: int
    order: Sorted | None

    @property
    def num_examples(self) -> int:
        """B."""
        return self.index_BK.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.index_BK.shape[1]

    @property
    def num_tokens(self) -> int:
        """T = B·S."""
        return self.num_examples * self.tokens_per_example


def rows_of(plan: DispatchPlan, *, is_sorted: bool) -> Rows:
    """The rows of a plan. A sort is kept on the plan, for the other linears and for backward."""
    index_BK = plan.example_index.contiguous()
    if not is_sorted:
        return Rows(index_BK, plan.tokens_per_example, plan.num_experts, None)
    if "triton" not in plan.derived:
        plan.derived["triton"] = sort(index_BK, plan.tokens_per_example, plan.num_experts)
    return Rows(index_BK, plan.tokens_per_example, plan.num_experts, plan.derived["triton"])


def sort(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> Sorted:
    """Sort on the device, without waiting for it; compilers see one operation."""
    if torch.compiler.is_compiling():
        return Sorted(*sort_op(index_BK, tokens_per_example, num_experts))
    from .launch.sort import run_sort

    return Sorted(*run_sort(index_BK, tokens_per_example, num_experts))


@torch.library.custom_op("peft_moe::triton_sort", mutates_args=())
def sort_op(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of [`Sorted`]."""
    from .launch.sort import run_sort

    return run_sort(index_BK, tokens_per_example, num_experts)


@sort_op.register_fake
def _(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = index_BK.shape[0] * index_BK.shape[1] * tokens_per_example
    segments = index_BK.shape[1] * num_experts
    return index_BK.new_empty(rows, dtype=torch.int32), index_BK.new_empty(segments, dtype=torch.int32)
