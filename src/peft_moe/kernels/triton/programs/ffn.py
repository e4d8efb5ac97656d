"""The programs for FFN experts: products with stacks of weights, with what surrounds them in the same pass.

*Pair* t·K + k is token t and its k-th expert. Rows are pairs sorted by expert, so that a tile of rows belongs to one
expert; pairs whose expert lives in another process come last and belong to no tile. F is the width inside; U is 2F
where there is a gate, whose columns come first, else F. A grid is as large as any routing can need, and tiles beyond
the last one return at once. Weights are read where they lie, whatever their strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import narrow, product, tile_of


@triton.jit
def tile_and_block(num_blocks, GROUP: tl.constexpr):
    """Tile of rows and block of columns of a program.

    Programs that run side by side share GROUP tiles and a few blocks, so that both stay in the cache.
    """
    program = tl.program_id(0)
    num_tiles = tl.num_programs(0) // num_blocks
    return tl.swizzle2d(program // num_blocks, program % num_blocks, num_tiles, num_blocks, GROUP)


@triton.jit
def like(values, other, UPCAST: tl.constexpr):
    """Weights in the dtype to compute in."""
    if values.dtype != other.dtype:
        values = narrow(values.to(tl.float32), other.dtype, UPCAST)
    return values


@triton.jit
def products(
    x,
    w,
    source,
    column,
    is_row,
    is_column,
    offset,
    D,
    stride_x,
    stride_wd,
    stride_ww,
    HAS_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `source` of `x` times some columns of `w` `(D, W)`, and times those `offset` elements behind them."""
    depth = tl.arange(0, BLOCK_D)
    x_tile = x + source.to(tl.int64)[:, None] * stride_x + depth[None, :]
    w_tile = w + depth[:, None] * stride_wd + column[None, :] * stride_ww
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    rest = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for first in range(0, D, BLOCK_D):
        is_depth = first + depth < D
        is_weight = is_depth[:, None] & is_column[None, :]
        left = tl.load(x_tile + first, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        right = tl.load(w_tile + first * stride_wd, mask=is_weight, other=0.0)
        total += product(left, like(right, left, UPCAST), UPCAST, PRECISION)
        if HAS_REST:
            right = tl.load(w_tile + first * stride_wd + offset, mask=is_weight, other=0.0)
            rest += product(left, like(right, left, UPCAST), UPCAST, PRECISION)
    return total, rest


@triton.jit
def activated_and_slope(x, ACTIVATION: tl.constexpr):
    """`act(x)` and `act'(x)`."""
    if ACTIVATION == "relu" or ACTIVATION == "relu2":
        activated = tl.where(x < 0, 0.0, x)
        slope = (x > 0).to(tl.float32)
        if ACTIVATION == "relu2":
            slope = 2.0 * activated
            activated *= activated
    else:  # x · s(x)
        if ACTIVATION == "gelu":
            factor = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
            growth = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        else:
            inside = x
            growth = tl.zeros_like(x) + 1.0
            if ACTIVATION == "quick_gelu":
                inside = 1.702 * x
                growth *= 1.702
            if ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh z) = sigmoid(2z)
                inside = 1.5957691216057308 * (x + 0.044715 * x * x * x)
                growth = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
            factor = tl.sigmoid(inside)
            growth = factor * (1.0 - factor) * growth
        activated = x * factor
        slope = factor + x * growth
    return activated, slope


@triton.jit
def first_linear(
    x,  # (T, D)
    w,  # (E, D, U)
    bias,  # (E, U), or nothing
    pair_of_row,  # (N,)
    segment_end,  # (E,) or more
    inner,  # (N, U), or nothing
    hidden,  # (N, F)
    D,
    F,
    stride_x,
    stride_we,
    stride_wd,
    stride_wf,
    E: tl.constexpr,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`u_n = x_t W_e + a_e` and `h_n = act(gate of u_n) · rest of u_n`, or `act(u_n)` without a gate.

    Replaces gather, product, activation and multiplication. Grid: (tiles · ⌈F / BLOCK_F⌉,).
    """
    tile, block = tile_and_block(tl.cdiv(F, BLOCK_F), GROUP)
    expert, start, stop = tile_of(segment_end, 0, 0, tile, E, SEGMENTS, BLOCK_M)
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    token = tl.load(pair_of_row + rows, mask=is_row, other=0) // K
    column = block * BLOCK_F + tl.arange(0, BLOCK_F)
    is_column = column < F
    total, rest = products(
        x,
        w + expert.to(tl.int64) * stride_we,
        token,
        column,
        is_row,
        is_column,
        F * stride_wf,
        D,
        stride_x,
        stride_wd,
        stride_wf,
        HAS_GATE,
        BLOCK_M,
        BLOCK_F,
        BLOCK_D,
        UPCAST,
        PRECISION,
    )
    U = F * 2 if HAS_GATE else F
    is_real = is_row[:, None] & is_column[None, :]
    begin = start.to(tl.int64)
    place = tl.arange(0, BLOCK_M)[:, None]
    where = place * U + column[None, :]
    if HAS_BIAS:
        total += tl.load(bias + expert * U + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    # rounded before the activation, so that backward, which has nothing else, sees the same activation
    gate = narrow(total, hidden.dtype.element_ty, UPCAST)
    if HAS_INNER:
        tl.store(inner + begin * U + where, gate, mask=is_real)
    gate = gate.to(tl.float32)
    values, _ = activated_and_slope(gate, ACTIVATION)
    if HAS_GATE:
        if HAS_BIAS:
            rest += tl.load(bias + expert * U + F + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        rest = narrow(rest, hidden.dtype.element_ty, UPCAST)
        if HAS_INNER:
            tl.store(inner + begin * U + F + where, rest, mask=is_real)
        values *= rest.to(tl.float32)
    where = place * F + column[None, :]
    tl.store(hidden + begin * F + where, narrow(values, hidden.dtype.element_ty, UPCAST), mask=is_real)


@triton.jit
def row_product(
    x,  # (T, D) where rows are gathered, else (N, D)
    w,  # (E, D, W)
    bias,  # (E, W), or nothing
    weight,  # (N,) float32 by pair, or nothing
    pair_of_row,  # (N,)
    segment_end,  # (E,) or more
    out,  # (N, W): by row where rows are gathered, else by pair
    D,
    W,
    stride_x,
    stride_we,
    stride_wd,
    stride_ww,
    E: tl.constexpr,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GATHERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out = w_tk · (x W_e + b_e)`, from tokens to rows or from rows to pairs. Grid: (tiles · ⌈W / BLOCK_W⌉,)."""
    tile, block = tile_and_block(tl.cdiv(W, BLOCK_W), GROUP)
    expert, start, stop = tile_of(segment_end, 0, 0, tile, E, SEGMENTS, BLOCK_M)
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    pair = tl.load(pair_of_row + rows, mask=is_row, other=0)
    source = pair // K if GATHERS else rows
    target = rows if GATHERS else pair
    column = block * BLOCK_W + tl.arange(0, BLOCK_W)
    is_column = column < W
    total, _ = products(
        x,
        w + expert.to(tl.int64) * stride_we,
        source,
        column,
        is_row,
        is_column,
        0,
        D,
        stride_x,
        stride_wd,
        stride_ww,
        False,
        BLOCK_M,
        BLOCK_W,
        BLOCK_D,
        UPCAST,
        PRECISION,
    )
    if HAS_BIAS:
        total += tl.load(bias + expert * W + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT:
        total *= tl.load(weight + pair, mask=is_row, other=0.0)[:, None]
    where = target.to(tl.int64)[:, None] * W + column[None, :]
    tl.store(out + where, narrow(total, out.dtype.element_ty, UPCAST), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def activation_gradient(
    g,  # (N, F), or nothing
    weight,  # (N,) float32 by pair
    pair_of_row,  # (N,)
    segment_end,  # (E,) or more
    inner,  # (N, U)
    grad_inner,  # (N, U), or nothing
    weighted,  # (N, F), may be `g`, or nothing
    dots,  # (N,) float32 by pair, or nothing
    F,
    E: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_INNER: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """From `g_n`, the gradient of `h_n` before it is weighted: `du_n = act'(u_n) w_tk g_n`, `w_tk h_n`, `h_n g_n`.

    `h_n` is computed anew from `u_n`. Grid: (⌈N / BLOCK_M⌉,).
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < tl.load(segment_end + E - 1)
    pair = tl.load(pair_of_row + rows, mask=is_row, other=0)
    scale = tl.load(weight + pair, mask=is_row, other=0.0)[:, None]
    U = F * 2 if HAS_GATE else F
    of_inner = rows.to(tl.int64)[:, None] * U
    of_hidden = rows.to(tl.int64)[:, None] * F
    total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for first in range(0, F, BLOCK_F):
        column = (first + tl.arange(0, BLOCK_F))[None, :]
        is_real = is_row[:, None] & (column < F)
        gate = tl.load(inner + of_inner + column, mask=is_real, other=0.0).to(tl.float32)
        activated, slope = activated_and_slope(gate, ACTIVATION)
        hidden = activated
        if HAS_GATE:
            rest = tl.load(inner + of_inner + F + column, mask=is_real, other=0.0).to(tl.float32)
            hidden = activated * rest
        if HAS_G:
            grad = tl.load(g + of_hidden + column, mask=is_real, other=0.0).to(tl.float32)
            total += grad * hidden
            grad *= scale
        if HAS_WEIGHTED:
            values = narrow(hidden * scale, weighted.dtype.element_ty, UPCAST)
            if HAS_G:  # `weighted` may be `g`, which other threads may be reading
                tl.debug_barrier()
            tl.store(weighted + of_hidden + column, values, mask=is_real)
        if HAS_INNER:
            of_gate = grad * slope
            if HAS_GATE:
                of_gate *= rest
                values = narrow(grad * activated, grad_inner.dtype.element_ty, UPCAST)
                tl.store(grad_inner + of_inner + F + column, values, mask=is_real)
            tl.store(
                grad_inner + of_inner + column, narrow(of_gate, grad_inner.dtype.element_ty, UPCAST), mask=is_real
            )
    if HAS_DOTS:
        tl.store(dots + pair, tl.sum(total, 1), mask=is_row)


@triton.jit
def stack_gradient(
    r,  # (N, R), by row
    y,  # (T, C), by token
    pair_of_row,  # (N,)
    segment_end,  # (E,) or more
    out,  # (E, R, C)
    R,
    C,
    stride_y,
    stride_oe,
    stride_or,
    stride_oc,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out_e = Σ_n r_n y_tᵀ` over the rows n of expert e. Grid: (⌈R / BLOCK_R⌉ · ⌈C / BLOCK_C⌉, E)."""
    row_block, column_block = tile_and_block(tl.cdiv(C, BLOCK_C), GROUP)
    expert = tl.program_id(1)
    start = tl.load(segment_end + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(segment_end + expert)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = row < R
    is_column = column < C
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N)
        is_inside = inside < stop
        token = tl.load(pair_of_row + inside, mask=is_inside, other=0) // K
        left = tl.load(
            r + inside.to(tl.int64)[None, :] * R + row[:, None], mask=is_row[:, None] & is_inside[None, :], other=0.0
        )
        right = tl.load(
            y + token.to(tl.int64)[:, None] * stride_y + column[None, :],
            mask=is_inside[:, None] & is_column[None, :],
            other=0.0,
        )
        total += product(left, right, UPCAST, PRECISION)
    where = expert.to(tl.int64) * stride_oe + row[:, None] * stride_or + column[None, :] * stride_oc
    tl.store(out + where, narrow(total, out.dtype.element_ty, UPCAST), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def bias_gradient(
    y,  # (T, W) where rows are gathered, else (N, W)
    weight,  # (N,) float32 by pair, or nothing
    pair_of_row,  # (N,)
    segment_end,  # (E,) or more
    out,  # (E, W)
    W,
    stride_y,
    K: tl.constexpr,
    GATHERS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`out_e = Σ_n w_tk · y` over the rows n of expert e. Grid: (⌈W / BLOCK_W⌉, E)."""
    expert = tl.program_id(1)
    start = tl.load(segment_end + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(segment_end + expert)
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_column = column < W
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for first in range(start, stop, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N)
        is_inside = inside < stop
        pair = tl.load(pair_of_row + inside, mask=is_inside, other=0)
        source = pair // K if GATHERS else inside
        values = tl.load(
            y + source.to(tl.int64)[:, None] * stride_y + column[None, :],
            mask=is_inside[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_WEIGHT:
            values *= tl.load(weight + pair, mask=is_inside, other=0.0)[:, None]
        total += values
    tl.store(out + expert * W + column, narrow(tl.sum(total, 0), out.dtype.element_ty, UPCAST), mask=is_column)
