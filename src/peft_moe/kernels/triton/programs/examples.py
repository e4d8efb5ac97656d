"""The programs for tokens that stay where they are: whole examples are routed, so a tile knows its experts.

Pair (t, k) is row t·K + k, so that `(N, R)` is `(T, K·R)`: *columns* are the ranks of all slots side by side, and one
product serves all slots. Column c belongs to slot c // R, and `index` says whose expert that is. Experts that no token
of a tile uses are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import narrow, product


@triton.jit
def shrink_examples(
    x,  # (T, D)
    w,  # (E, R, D)
    index,  # (B, K) int64
    out,  # (T, K·R)
    other,  # (T, K·R), or nothing
    dots,  # (C blocks, T, K) float32, or nothing
    num_tokens,
    tokens_per_example,
    D,
    stride_x,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_tk = W_e x_t` for the K experts of an example; with `other`, also `dots_tk = out_tk · other_tk`.

    Grid: (B · ⌈S / BLOCK_M⌉, ⌈K·R / BLOCK_C⌉).
    """
    tiles = tl.cdiv(tokens_per_example, BLOCK_M)
    example = tl.program_id(0) // tiles
    place = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = place < tokens_per_example
    token = (example * tokens_per_example + place).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = column < K * R
    expert = tl.load(index + example * K + column // R, mask=is_column, other=0)
    depth = tl.arange(0, BLOCK_D)
    x_tile = x + token[:, None] * stride_x + depth[None, :]
    w_tile = w + (expert * R + column % R)[None, :] * D + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, D, BLOCK_D):
        is_depth = first + depth < D
        left = tl.load(x_tile + first, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        right = tl.load(w_tile + first, mask=is_column[None, :] & is_depth[:, None], other=0.0)
        total += product(left, right, UPCAST, PRECISION)
    where = token[:, None] * (K * R) + column[None, :]
    is_real = is_row[:, None] & is_column[None, :]
    tl.store(out + where, narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)
    if HAS_OTHER:
        total *= tl.load(other + where, mask=is_real, other=0.0).to(tl.float32)
        pair = dots + tl.program_id(1).to(tl.int64) * num_tokens * K + token * K
        for slot in tl.static_range(0, K):
            of_slot = (column // R == slot)[None, :]
            tl.store(pair + slot, tl.sum(tl.where(of_slot, total, 0.0), 1), mask=is_row)


@triton.jit
def expand_examples(
    h,  # (T, K·R)
    w,  # (E, R, W)
    weight,  # (B, K) float32, or nothing
    index,  # (B, K) int64
    source,  # (T, W), or nothing
    out,  # (T, W)
    tokens_per_example,
    W,
    stride_source,
    scaling,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_tk`, all slots at once.

    Grid: (B · ⌈S / BLOCK_M⌉, ⌈W / BLOCK_W⌉).
    """
    tiles = tl.cdiv(tokens_per_example, BLOCK_M)
    example = tl.program_id(0) // tiles
    place = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = place < tokens_per_example
    token = (example * tokens_per_example + place).to(tl.int64)
    width = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_width = width < W
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for first in range(0, K * R, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        is_column = column < K * R
        choice = example * K + column // R
        expert = tl.load(index + choice, mask=is_column, other=0)
        factor = tl.zeros((BLOCK_C,), tl.float32) + scaling
        if HAS_WEIGHT:
            factor = factor * tl.load(weight + choice, mask=is_column, other=0.0)
        left = tl.load(
            h + token[:, None] * (K * R) + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        left = narrow(left.to(tl.float32) * factor[None, :], h.dtype.element_ty, UPCAST)
        right = tl.load(
            w + (expert * R + column % R)[:, None] * W + width[None, :],
            mask=is_column[:, None] & is_width[None, :],
            other=0.0,
        )
        total += product(left, right, UPCAST, PRECISION)
    is_real = is_row[:, None] & is_width[None, :]
    if HAS_SOURCE:
        total += tl.load(source + token[:, None] * stride_source + width[None, :], mask=is_real, other=0.0).to(
            tl.float32
        )
    tl.store(out + token[:, None] * W + width[None, :], narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)


@triton.jit
def weight_gradient_examples(
    h,  # (T, K·R)
    y,  # (T, W)
    weight,  # (B, K) float32, or nothing
    index,  # (B, K) int64
    out,  # (SPLITS, E, R, W) float32
    num_choices,
    tokens_per_example,
    E,
    W,
    stride_y,
    scaling,
    K: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_e = Σ scaling · w_bk · h_tk y_tᵀ` over the tokens of all examples b that chose e as their k-th expert.

    The splits of an expert take its blocks of tokens in turn. Grid: (E · SPLITS, ⌈R / BLOCK_R⌉, ⌈W / BLOCK_W⌉).
    """
    expert = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    width = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_rank = rank < R
    is_width = width < W
    blocks = tl.cdiv(tokens_per_example, BLOCK_N)
    turn = split
    total = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for choice in range(0, num_choices):
        is_mine = tl.load(index + choice) == expert
        start = (choice // K) * tokens_per_example
        stop = tl.where(is_mine, start + tokens_per_example, start)
        factor = scaling
        if HAS_WEIGHT:
            factor = scaling * tl.load(weight + choice)
        for first in range(start + turn * BLOCK_N, stop, SPLITS * BLOCK_N):
            token = first + tl.arange(0, BLOCK_N)
            is_row = token < stop
            row = token.to(tl.int64) * K + choice % K
            left = tl.load(h + row[None, :] * R + rank[:, None], mask=is_rank[:, None] & is_row[None, :], other=0.0)
            left = narrow(left.to(tl.float32) * factor, h.dtype.element_ty, UPCAST)
            right = tl.load(
                y + token.to(tl.int64)[:, None] * stride_y + width[None, :],
                mask=is_row[:, None] & is_width[None, :],
                other=0.0,
            )
            total += product(left, right, UPCAST, PRECISION)
        taken = tl.where(is_mine, blocks, 0)
        turn = (turn + SPLITS - taken % SPLITS) % SPLITS
    where = ((split * E + expert).to(tl.int64) * R + rank[:, None]) * W + width[None, :]
    tl.store(out + where, total, mask=is_rank[:, None] & is_width[None, :])
