"""The programs for a few narrow experts: all experts for all tokens, and nothing is sorted.

*Columns* are the E·R ranks of all experts side by side, so that x is read once and y written once, whatever the
routing; column c belongs to expert c // R. Where a token did not choose that expert, the column is left out of what
follows, whatever its value; but a weight that is not finite reaches all tokens, not only those that chose its expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import narrow, product


@triton.jit
def weighted(
    h,  # (M, C) or (C, M) values of columns
    index,  # (B, K) int64
    weight,  # (B, K) float32, or nothing
    choice,  # K · the example of each token, shaped so that it broadcasts
    is_row,
    expert,  # the expert of each column, shaped so that it broadcasts
    scaling,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """`scaling · w · h` where a token chose the expert of a column, else 0, in float32; chosen twice counts twice."""
    factor = tl.zeros_like(h).to(tl.float32)
    is_chosen = factor != 0.0
    for slot in tl.static_range(0, K):
        value = tl.zeros_like(choice).to(tl.float32) + scaling
        if HAS_WEIGHT:
            value = value * tl.load(weight + choice + slot, mask=is_row, other=0.0)
        is_it = tl.load(index + choice + slot, mask=is_row, other=-1) == expert
        factor += tl.where(is_it, value, 0.0)
        is_chosen = is_chosen | is_it
    return tl.where(is_chosen, h.to(tl.float32) * factor, 0.0)


@triton.jit
def shrink_dense(
    x,  # (T, D)
    w,  # (E·R, D)
    index,  # (B, K) int64
    out,  # (T, E·R)
    other,  # (T, E·R), or nothing
    dots,  # (C blocks, T, K) float32, or nothing
    num_tokens,
    tokens_per_example,
    D,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_te = W_e x_t` for all experts; with `other`, also `dots_tk = out_te · other_te`, e the k-th of token t.

    Grid: (⌈T / BLOCK_M⌉, ⌈E·R / BLOCK_C⌉).
    """
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = token < num_tokens
    is_column = column < E * R
    depth = tl.arange(0, BLOCK_D)
    x_tile = x + token[:, None] * stride_x + depth[None, :]
    w_tile = w + column.to(tl.int64)[None, :] * D + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, D, BLOCK_D):
        is_depth = first + depth < D
        left = tl.load(x_tile + first, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        right = tl.load(w_tile + first, mask=is_column[None, :] & is_depth[:, None], other=0.0)
        total += product(left, right, UPCAST, PRECISION)
    where = token[:, None] * (E * R) + column[None, :]
    is_real = is_row[:, None] & is_column[None, :]
    tl.store(out + where, narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)
    if HAS_OTHER:
        total *= tl.load(other + where, mask=is_real, other=0.0).to(tl.float32)
        choice = (token // tokens_per_example) * K
        pair = dots + tl.program_id(1).to(tl.int64) * num_tokens * K + token * K
        for slot in tl.static_range(0, K):
            expert = tl.load(index + choice + slot, mask=is_row, other=-1)
            of_expert = expert[:, None] == (column // R)[None, :]
            tl.store(pair + slot, tl.sum(tl.where(of_expert, total, 0.0), 1), mask=is_row)


@triton.jit
def expand_dense(
    h,  # (T, E·R)
    w,  # (E·R, W)
    weight,  # (B, K) float32, or nothing
    index,  # (B, K) int64
    source,  # (T, W), or nothing
    out,  # (T, W)
    num_tokens,
    tokens_per_example,
    W,
    stride_source,
    scaling,
    E: tl.constexpr,
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
    """`out_t = source_t + Σ_k scaling · w_tk · W_eᵀ h_te`, in one product. Grid: (⌈T / BLOCK_M⌉, ⌈W / BLOCK_W⌉)."""
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    width = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_row = token < num_tokens
    is_width = width < W
    choice = ((token // tokens_per_example) * K)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for first in range(0, E * R, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        is_column = column < E * R
        left = tl.load(
            h + token[:, None] * (E * R) + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        left = weighted(left, index, weight, choice, is_row[:, None], (column // R)[None, :], scaling, K, HAS_WEIGHT)
        right = tl.load(
            w + column.to(tl.int64)[:, None] * W + width[None, :],
            mask=is_column[:, None] & is_width[None, :],
            other=0.0,
        )
        total += product(narrow(left, h.dtype.element_ty, UPCAST), right, UPCAST, PRECISION)
    is_real = is_row[:, None] & is_width[None, :]
    if HAS_SOURCE:
        total += tl.load(source + token[:, None] * stride_source + width[None, :], mask=is_real, other=0.0).to(
            tl.float32
        )
    tl.store(out + token[:, None] * W + width[None, :], narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)


@triton.jit
def weight_gradient_dense(
    h,  # (T, E·R)
    y,  # (T, W)
    weight,  # (B, K) float32, or nothing
    index,  # (B, K) int64
    out,  # (SPLITS, E·R, W) float32
    num_tokens,
    tokens_per_example,
    W,
    stride_y,
    scaling,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_e = Σ scaling · w_tk · h_te y_tᵀ` over the tokens t whose k-th expert is e, every SPLITS-th block of them.

    Grid: (SPLITS, ⌈E·R / BLOCK_C⌉, ⌈W / BLOCK_W⌉).
    """
    split = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    width = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_column = column < E * R
    is_width = width < W
    total = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    for first in range(split * BLOCK_N, num_tokens, SPLITS * BLOCK_N):
        token = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = token < num_tokens
        choice = ((token // tokens_per_example) * K)[None, :]
        left = tl.load(
            h + token[None, :] * (E * R) + column[:, None], mask=is_column[:, None] & is_row[None, :], other=0.0
        )
        left = weighted(left, index, weight, choice, is_row[None, :], (column // R)[:, None], scaling, K, HAS_WEIGHT)
        right = tl.load(
            y + token[:, None] * stride_y + width[None, :], mask=is_row[:, None] & is_width[None, :], other=0.0
        )
        total += product(narrow(left, h.dtype.element_ty, UPCAST), right, UPCAST, PRECISION)
    where = (split.to(tl.int64) * (E * R) + column[:, None]) * W + width[None, :]
    tl.store(out + where, total, mask=is_column[:, None] & is_width[None, :])
