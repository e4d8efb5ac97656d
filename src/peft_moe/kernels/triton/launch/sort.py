"""Starts the sort."""

from __future__ import annotations

import torch
import triton

from ..programs import sort as programs
from ..tiles import next_power_of_two
from .device import on_its_device


# choices times experts that a program compares at once
SORT_TILE = 2048
# programs for each slot, where there are as many experts
SORT_PROGRAMS = 32
SORT_WARPS = 8


def sort_blocks(num_experts: int) -> tuple[int, int]:
    """Choices per step and experts per program: all of few experts side by side, many in groups that read less."""
    experts = max(next_power_of_two(num_experts) // SORT_PROGRAMS, 1)
    return max(SORT_TILE // experts, 64), experts


@on_its_device
def run_sort(index_BK: torch.Tensor, tokens_per_example: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_of_row (N,)` and `segment_end (K·E,)` of a contiguous choice, both int32, in one launch."""
    num_examples, top_k = index_BK.shape
    num_tokens = num_examples * tokens_per_example
    token_of_row = index_BK.new_empty(num_tokens * top_k, dtype=torch.int32)
    segment_end = index_BK.new_empty(num_experts * top_k, dtype=torch.int32)
    block_tokens, block_experts = sort_blocks(num_experts)
    programs.sort_by_expert[(triton.cdiv(num_experts, block_experts), top_k)](
        index_BK,
        token_of_row,
        segment_end,
        num_tokens,
        tokens_per_example,
        num_experts,
        K=top_k,
        BLOCK_T=block_tokens,
        BLOCK_E=block_experts,
        num_warps=SORT_WARPS,
    )
    return token_of_row, segment_end
