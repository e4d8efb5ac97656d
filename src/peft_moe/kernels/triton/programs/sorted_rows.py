"""The programs for tokens that are routed one by one.

Rows are (slot, token) pairs sorted by slot, then by expert, so that the rows of slot k are k·T .. (k+1)·T - 1. A
*segment* is the run of rows of one slot and one expert; `segment_end` says where each ends. A grid is as large as any
routing can need, tiles beyond the last one return at once, and the host never waits for the device to learn the loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import narrow, product, tile_of


@triton.jit
def shrink(
    x,  # (T, D)
    w,  # (E, R, D)
    token_of_row,  # (N,)
    segment_end,  # (K·E,)
    out,  # (N, R)
    other,  # (N, R), or nothing
    dots,  # (R blocks, T, K) float32, or nothing
    num_tokens,
    D,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_n = W_e x_t` for row n of token t and expert e; with `other`, also `dots_tk = out_n · other_n`."""
    segment, start, stop = tile_of(segment_end, 0, 0, tl.program_id(0), K * E, SEGMENTS, BLOCK_M)
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    token = tl.load(token_of_row + rows, mask=is_row, other=0)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_rank = ranks < R
    columns = tl.arange(0, BLOCK_D)
    x_tile = x + token.to(tl.int64)[:, None] * stride_x + columns[None, :]
    w_tile = w + (segment % E).to(tl.int64) * R * D + ranks[None, :] * D + columns[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, D, BLOCK_D):
        is_column = first + columns < D
        left = tl.load(x_tile + first, mask=is_row[:, None] & is_column[None, :], other=0.0)
        right = tl.load(w_tile + first, mask=is_rank[None, :] & is_column[:, None], other=0.0)
        total += product(left, right, UPCAST, PRECISION)
    where = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    is_real = is_row[:, None] & is_rank[None, :]
    tl.store(out + where, narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)
    if HAS_OTHER:
        values = tl.load(other + where, mask=is_real, other=0.0).to(tl.float32)
        pair = tl.program_id(1).to(tl.int64) * num_tokens * K + token * K + rows // num_tokens
        tl.store(dots + pair, tl.sum(total * values, 1), mask=is_row)


@triton.jit
def expand(
    h,  # (N, R)
    w,  # (E, R, W)
    weight,  # (B, K) float32, or nothing
    token_of_row,  # (N,)
    segment_end,  # (K·E,)
    source,  # (T, W), or nothing
    out,  # (T, W)
    num_tokens,
    tokens_per_example,
    W,
    stride_source,
    scaling,
    slot,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_t = source_t + scaling · w_bk · W_eᵀ h_n` for the rows n of one slot k, where a token is once."""
    segment, start, stop = tile_of(segment_end, slot * E, slot * num_tokens, tl.program_id(0), E, SEGMENTS, BLOCK_M)
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    token = tl.load(token_of_row + rows, mask=is_row, other=0).to(tl.int64)
    factor = tl.zeros((BLOCK_M,), tl.float32) + scaling
    if HAS_WEIGHT:
        factor = factor * tl.load(weight + (token // tokens_per_example) * K + slot, mask=is_row, other=0.0)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_column = columns < W
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for first in tl.static_range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        is_rank = ranks < R
        left = tl.load(
            h + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=is_row[:, None] & is_rank[None, :], other=0.0
        )
        left = narrow(left.to(tl.float32) * factor[:, None], h.dtype.element_ty, UPCAST)
        right = tl.load(
            w + segment.to(tl.int64) * R * W + ranks[:, None] * W + columns[None, :],
            mask=is_rank[:, None] & is_column[None, :],
            other=0.0,
        )
        total += product(left, right, UPCAST, PRECISION)
    is_real = is_row[:, None] & is_column[None, :]
    if HAS_SOURCE:
        total += tl.load(source + token[:, None] * stride_source + columns[None, :], mask=is_real, other=0.0).to(
            tl.float32
        )
    tl.store(out + token[:, None] * W + columns[None, :], narrow(total, out.dtype.element_ty, UPCAST), mask=is_real)


@triton.jit
def weight_gradient(
    h,  # (N, R)
    y,  # (T, W)
    weight,  # (B, K) float32, or nothing
    token_of_row,  # (N,)
    segment_end,  # (K·E,)
    out,  # (SPLITS, E, R, W) float32
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
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_e = Σ_n scaling · w_bk · h_n y_tᵀ` over the rows n of expert e, every SPLITS-th block of them."""
    expert = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_rank = ranks < R
    is_column = columns < W
    total = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for slot in tl.static_range(0, K):
        segment = slot * E + expert
        start = tl.load(segment_end + segment - 1, mask=segment > 0, other=0)
        stop = tl.load(segment_end + segment)
        for first in range(start + split * BLOCK_N, stop, SPLITS * BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            is_row = rows < stop
            token = tl.load(token_of_row + rows, mask=is_row, other=0).to(tl.int64)
            factor = tl.zeros((BLOCK_N,), tl.float32) + scaling
            if HAS_WEIGHT:
                factor = factor * tl.load(weight + (token // tokens_per_example) * K + slot, mask=is_row, other=0.0)
            left = tl.load(
                h + rows.to(tl.int64)[None, :] * R + ranks[:, None], mask=is_rank[:, None] & is_row[None, :], other=0.0
            )
            left = narrow(left.to(tl.float32) * factor[None, :], h.dtype.element_ty, UPCAST)
            right = tl.load(
                y + token[:, None] * stride_y + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
            )
            total += product(left, right, UPCAST, PRECISION)
    where = ((split * E + expert).to(tl.int64) * R + ranks[:, None]) * W + columns[None, :]
    tl.store(out + where, total, mask=is_rank[:, None] & is_column[None, :])
