"""`Float32Module`: parameters and buffers that stay float32 in a half-precision model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Float32Module(nn.Module):
    """Follows the model to another device, but keeps its dtype where the model is cast to half precision.

    A rounded logit can change the choice of an expert, and a bfloat16 softmax ties often.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
