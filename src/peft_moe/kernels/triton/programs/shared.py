"""What the programs share.

Sums are kept in float32. `UPCAST` computes products of narrow operands in float32 too, for the interpreter, whose
bfloat16 products are wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(left, right, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`left @ right` in float32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def narrow(values, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 as DTYPE, to the nearest; the interpreter cuts off the bits that bfloat16 lacks, hence the detour."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def tile_of(
    segment_end,
    first_segment,
    first_row,
    tile,
    NUM_SEGMENTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Segment (counted from `first_segment`), first row and end of the segment of a tile; no rows if there is none.

    A segment of n rows has ⌈n / BLOCK_M⌉ tiles. SEGMENTS is NUM_SEGMENTS rounded up to a power of two.
    """
    index = tl.arange(0, SEGMENTS)
    is_real = index < NUM_SEGMENTS
    end = tl.load(segment_end + first_segment + index, mask=is_real, other=0)
    begin = tl.load(segment_end + first_segment + index - 1, mask=is_real & (index > 0), other=0)
    begin = tl.where(index == 0, first_row, begin)
    num_tiles = tl.where(is_real, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_through = tl.cumsum(num_tiles, 0)
    segment = tl.sum((tiles_through <= tile).to(tl.int32), 0)
    is_it = index == segment
    before = tl.sum(tl.where(is_it, tiles_through - num_tiles, 0), 0)
    start = tl.sum(tl.where(is_it, begin, 0), 0) + (tile - before) * BLOCK_M
    stop = tl.sum(tl.where(is_it, end, 0), 0)
    return segment, start, stop
