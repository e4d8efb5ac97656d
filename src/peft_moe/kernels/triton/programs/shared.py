"""What the programs share.

Sums are kept in float32. `UPCAST` computes products of narrow operands in float32 too, for the interpreter, whose bfloat16
products are wrong.
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
    if UPCAST:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)
