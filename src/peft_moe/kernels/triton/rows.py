"""The order in which the programs see the (slot, token) pairs of a plan."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan import DispatchPlan


class Rows(NamedTuple):
    """The pairs sorted by slot, then by expert.

    Args:
        token_of_row (`torch.Tensor` of shape `(N,)`, int32): row → token; rows of slot k are k·T .. (k+1)·T - 1.
        segment_end (`torch.Tensor` of shape `(K·E,)`, int32): where the rows of each slot and expert end.
        num_tokens, num_experts, top_k (`int`): T, E, K.
    """

    token_of_row: torch.Tensor
    segment_end: torch.Tensor
    num_tokens: int
    num_experts: int
    top_k: int


def rows_of(plan: DispatchPlan) -> Rows:
    """Sort the pairs on their device, without waiting for it; kept on the plan for the other linears and for backward."""
    if "triton" not in plan.derived:
        plan.derived["triton"] = sort(plan.top_k_index, plan.num_experts)
    rows: Rows = plan.derived["triton"]
    return rows


def sort(index_TK: torch.Tensor, num_experts: int) -> Rows:
    """The rows of a choice `(T, K)`; tokens of one segment keep their order."""
    num_tokens, top_k = index_TK.shape
    num_segments = top_k * num_experts
    slot = torch.arange(top_k, device=index_TK.device).unsqueeze(1)
    segment = (index_TK.t() + num_experts * slot).reshape(-1)
    # int16 keys take fewer radix passes than int64 ones
    order = torch.argsort(segment.to(torch.int16) if num_segments < 2**15 else segment, stable=True)
    load = torch.zeros(num_segments, dtype=torch.int64, device=segment.device)
    load = load.scatter_add(0, segment, torch.ones_like(segment))
    token_of_row = (order % max(num_tokens, 1)).to(torch.int32)
    return Rows(token_of_row, load.cumsum(0).to(torch.int32), num_tokens, num_experts, top_k)
