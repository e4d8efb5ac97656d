"""Triton kernels. Only `programs/` and `launch_*` import triton, and nothing imports these at the start."""

from __future__ import annotations

import os


def is_interpreted() -> bool:
    """Whether programs run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
