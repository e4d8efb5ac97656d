"""Where programs start."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch


P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[torch.Tensor, P], R]) -> Callable[Concatenate[torch.Tensor, P], R]:
    """Make the device of the first tensor the current one: Triton starts programs there, wherever the tensors are.

    On a CPU, in the interpreter, it does nothing.
    """

    @wraps(launch)
    def run(first: torch.Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return launch(first, *args, **kwargs)

    return run
