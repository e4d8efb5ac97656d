"""The order in which programs see the (token, slot) pairs of a plan or of FFN experts, and the sort."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan import DispatchPlan
from .tiles import Tiles, launch, next_power_of_two


# choices times experts that a program of the sort compares at once
SORT_TILE = 2048
# programs for each slot, where there are as many experts
SORT_PROGRAMS = 32
SORT_WARPS = 8


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


class Order(NamedTuple):
    """The pairs of token and FFN expert, sorted by expert.

    Args:
        index_TK (`torch.Tensor` of shape `(T, K)`, int64): the experts of each token.
        pair_of_row (`torch.Tensor` of shape `(N,)`, int32): row → t·K + k.
        segment_end (`torch.Tensor` of shape `(E,)` or `(E + 1,)`, int32):
            Where the rows of each expert end; experts of other processes are a further one.
    """

    index_TK: torch.Tensor
    pair_of_row: torch.Tensor
    segment_end: torch.Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.index_TK.shape[1]

    @property
    def num_pairs(self) -> int:
        """N = T·K."""
        return self.index_TK.numel()

    def has_sentinel(self, num_experts: int) -> bool:
        """Whether pairs may name an expert of another process."""
        return self.segment_end.shape[0] > num_experts


class Wanted(NamedTuple):
    """What backward needs from between the linears: `du` `(N, U)`, `w h` `(N, F)` by row, `h · g` `(N,)` by pair."""

    grad_inner: bool
    weighted: bool
    dots: bool


def order_of(top_k_index: torch.Tensor, num_experts: int) -> Order:
    """Sort a choice of FFN experts on the device, without waiting for it."""
    index_TK = top_k_index.long().contiguous()
    return Order(index_TK, *sort(index_TK.view(-1, 1), 1, num_experts))


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
    return Sorted(*run_sort(index_BK, tokens_per_example, num_experts))


def sort_blocks(num_experts: int) -> tuple[Tiles, dict[str, int]]:
    """Choices per step and experts per program: all of few experts side by side, many in groups that read less."""
    experts = max(next_power_of_two(num_experts) // SORT_PROGRAMS, 1)
    tiles = Tiles(max(SORT_TILE // experts, 64), experts, SORT_WARPS, 3)
    return tiles, {"BLOCK_T": tiles.rows, "BLOCK_E": tiles.columns}


def run_sort(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_of_row (N,)` and `segment_end (K·E,)` of a contiguous choice, both int32, in one launch."""
    from .programs.sort import sort_by_expert  # needs the package triton

    num_examples, top_k = index_BK.shape
    num_tokens = num_examples * tokens_per_example
    token_of_row = index_BK.new_empty(num_tokens * top_k, dtype=torch.int32)
    segment_end = index_BK.new_empty(num_experts * top_k, dtype=torch.int32)
    tiles, sizes = sort_blocks(num_experts)
    facts = {"index": index_BK, "token_of_row": token_of_row, "segment_end": segment_end, "num_tokens": num_tokens}
    facts |= {"tokens_per_example": tokens_per_example, "E": num_experts, "K": top_k, **sizes}
    launch(sort_by_expert, (-(-num_experts // tiles.columns), top_k), tiles, index_BK, facts)
    return token_of_row, segment_end


@torch.library.custom_op("peft_moe::triton_sort", mutates_args=())
def sort_op(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of [`Sorted`]."""
    return run_sort(index_BK, tokens_per_example, num_experts)


@sort_op.register_fake
def _(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = index_BK.shape[0] * index_BK.shape[1] * tokens_per_example
    segments = index_BK.shape[1] * num_experts
    return index_BK.new_empty(rows, dtype=torch.int32), index_BK.new_empty(segments, dtype=torch.int32)
