"""The least work of a cell, and the two ceilings of the device: bytes per second and products per second."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from shapes import Shape
from timing import Clock, interleaved


ROUNDS = 10


def floor(shape: Shape, itemsize: int) -> dict[str, float]:
    """Operations and bytes of the frozen layer and the active experts, each tensor read or written once per pass.

    Forward: x, W, A, B in, y out. Backward: dy, x, W, A, B in, dx, dA, dB out. W has no gradient. All E experts are
    counted, or as many as all tokens can choose.
    """
    tokens, pairs = shape.num_tokens, shape.num_tokens * shape.top_k
    inputs, outputs = tokens * shape.in_features, tokens * shape.out_features
    weight = shape.in_features * shape.out_features
    both_widths = shape.rank * (shape.in_features + shape.out_features)
    factors = min(shape.num_experts, pairs) * both_widths
    flops = 2 * tokens * weight + 2 * pairs * both_widths
    elements = inputs + weight + factors + outputs
    if not shape.is_inference:
        flops += 2 * tokens * weight + 4 * pairs * both_widths
        elements += outputs + 2 * inputs + weight + 2 * factors
    return {"flops": float(flops), "bytes": float(elements * itemsize)}


def floor_ms(work: dict[str, float], ceilings: dict[str, float]) -> float:
    """The time below which nothing on this device can do the work."""
    return max(work["flops"] / ceilings["tflops"] / 1e9, work["bytes"] / ceilings["gb_per_s"] / 1e6)


def measure_ceilings(clock: Clock, device: str, dtype: torch.dtype, is_quick: bool) -> dict[str, float]:
    """Bytes read and written by a large copy, and a large product of random matrices, per second."""
    num_bytes, side = (2**32, 8192) if device == "cuda" else (2**28, 1024)
    if is_quick:
        num_bytes, side = 2**20, 64
    source = torch.randint(2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copied = interleaved({"copy": partial(target.copy_, source)}, clock, ROUNDS)["copy"]
    del source, target
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiplied = interleaved({"product": partial(torch.mm, left, right)}, clock, ROUNDS)["product"]
    return {
        "gb_per_s": 2 * num_bytes / max(statistics.median(copied), 1e-6) / 1e6,
        "tflops": 2 * side**3 / max(statistics.median(multiplied), 1e-6) / 1e9,
        "copied_bytes": num_bytes,
        "side_of_product": side,
    }
