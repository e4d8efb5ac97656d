"""The programs for a few pairs: products of a matrix and a vector, which read each weight once, without tensor cores.

Pair (t, k) is row t·K + k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import narrow


@triton.jit
def shrink_pairs(
    x,  # (T, D)
    w,  # (E, R, D)
    index,  # (B, K) int64
    out,  # (N, R)
    tokens_per_example,
    D,
    stride_x,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`out_tk = W_e x_t`, a few ranks of one pair. Grid: (N, ⌈R / BLOCK_R⌉)."""
    pair = tl.program_id(0)
    token = pair // K
    expert = tl.load(index + (token // tokens_per_example) * K + pair % K)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_rank = rank < R
    depth = tl.arange(0, BLOCK_D)
    w_tile = w + (expert * R + rank)[:, None] * D + depth[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        is_depth = first + depth < D
        x_part = tl.load(x + token.to(tl.int64) * stride_x + first + depth, mask=is_depth, other=0.0)
        w_part = tl.load(w_tile + first, mask=is_rank[:, None] & is_depth[None, :], other=0.0)
        total += w_part.to(tl.float32) * x_part.to(tl.float32)[None, :]
    tl.store(out + pair * R + rank, narrow(tl.sum(total, 1), out.dtype.element_ty, UPCAST), mask=is_rank)


@triton.jit
def expand_pairs(
    h,  # (N, R)
    w,  # (E, R, W)
    weight,  # (B, K) float32, or nothing
    index,  # (B, K) int64
    source,  # (T, W)
    out,  # (T, W)
    tokens_per_example,
    W,
    stride_source,
    scaling,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_tk` for one token, all slots. Grid: (T, ⌈W / BLOCK_W⌉)."""
    token = tl.program_id(0)
    width = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_width = width < W
    total = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for slot in range(0, K):
        choice = (token // tokens_per_example) * K + slot
        expert = tl.load(index + choice)
        factor = scaling
        if HAS_WEIGHT:
            factor = scaling * tl.load(weight + choice)
        for first in range(0, R, BLOCK_R):
            rank = first + tl.arange(0, BLOCK_R)
            is_rank = rank < R
            h_part = tl.load(h + (token * K + slot) * R + rank, mask=is_rank, other=0.0).to(tl.float32) * factor
            w_part = tl.load(
                w + (expert * R + rank)[:, None] * W + width[None, :],
                mask=is_rank[:, None] & is_width[None, :],
                other=0.0,
            )
            total += h_part[:, None] * w_part.to(tl.float32)
    y = tl.sum(total, 0)
    y += tl.load(source + token.to(tl.int64) * stride_source + width, mask=is_width, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * W + width, narrow(y, out.dtype.element_ty, UPCAST), mask=is_width)
