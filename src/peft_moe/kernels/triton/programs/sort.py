"""The program that sorts (token, slot) pairs by slot, then by expert."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_by_expert(
    index,  # (B, K) int64
    token_of_row,  # (K·T,) int32
    segment_end,  # (K·E,) int32
    num_tokens,
    tokens_per_example,
    E,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The rows of one slot and BLOCK_E experts: count the choices below, then write the tokens in their order.

    Replaces a stable sort by k·E + e, a histogram and a prefix sum. Each program reads all choices of its slot twice;
    none waits for another, and none writes where another does. Grid: (E / BLOCK_E, K).
    """
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    slot = tl.program_id(1)
    nobody = 1 << 30  # beyond every expert: neither below nor equal to one
    num_below = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for first in range(0, num_tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        choice = tl.load(index + (token // tokens_per_example) * K + slot, mask=token < num_tokens, other=nobody)
        num_below += (choice[:, None] < experts[None, :]).to(tl.int32)
    next_row = slot * num_tokens + tl.sum(num_below, 0)
    for first in range(0, num_tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        choice = tl.load(index + (token // tokens_per_example) * K + slot, mask=token < num_tokens, other=nobody)
        is_mine = (choice[:, None] == experts[None, :]).to(tl.int32)
        row = tl.sum(is_mine * (next_row[None, :] + tl.cumsum(is_mine, 0) - 1), 1)
        tl.store(token_of_row + row, token, mask=tl.sum(is_mine, 1) > 0)
        next_row += tl.sum(is_mine, 0)
    tl.store(segment_end + slot * E + experts, next_row, mask=experts < E)
