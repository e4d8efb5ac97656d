"""`Backend`: what a file in `backends/` exposes as `BACKEND`, and the registry that finds those files."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .case import Case


# (hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace) -> out of the shape of base_out; the first four
# have one dtype and device; hidden_states and base_out have any leading dimensions
Run = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        "torch.Tensor | None",
        Any,
        float,
        bool,
    ],
    torch.Tensor,
]


def always_usable() -> tuple[bool, str]:
    """For backends that need nothing but torch."""
    return True, "needs only torch"


def supports_everything(case: Case) -> tuple[bool, str]:
    """For backends without limits on shape, dtype or device."""
    return True, "no limits"


@dataclass(frozen=True)
class Backend:
    """One way to compute the op.

    Args:
        name (`str`):
            What users write as `backend=...`; equal to the name of the file.
        summary (`str`):
            One line for reports.
        run (`Run`):
            The function. Must be differentiable where its inputs require gradients.
        is_usable (`Callable[[], tuple[bool, str]]`):
            Whether this environment can run it at all, and why (not).
        supports (`Callable[[Case], tuple[bool, str]]`):
            Whether it can run this shape, dtype and device, and why (not).
        traces_fullgraph (`bool`):
            Whether `torch.compile(fullgraph=True)` can trace it.
        needs_plan (`bool`):
            Whether ordinary LoRA reaches it with a plan that sends every token to expert 0; `False` to get `None`.
        takes_examples (`bool`):
            Whether weights of a plan that routes whole examples reach it as `(B, K)`; `False` to get `(T, K)`.
    """

    name: str
    summary: str
    run: Run
    is_usable: Callable[[], tuple[bool, str]] = always_usable
    supports: Callable[[Case], tuple[bool, str]] = supports_everything
    traces_fullgraph: bool = False
    needs_plan: bool = True
    takes_examples: bool = False


def discover(package: ModuleType) -> dict[str, Backend]:
    """Import every module of `package` and collect its `BACKEND`, by name.

    Raises:
        `ImportError`: if a module has no `BACKEND`, or one that is not called like its file.
    """
    found = {}
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        backend = getattr(module, "BACKEND", None)
        if not isinstance(backend, Backend) or backend.name != module_info.name:
            raise ImportError(
                f"{module.__name__} must define BACKEND = Backend(name={module_info.name!r}, ...), but BACKEND is "
                f"{backend!r}. Name it after its file, or move the file out of {package.__name__}."
            )
        found[backend.name] = backend
    return found


def unknown_backend_message(name: str, known: dict[str, Backend]) -> str:
    """Say that `name` is unknown, what it may have meant, and what there is."""
    close = difflib.get_close_matches(name, ["auto", *known], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"There is no kernel backend {name!r}.{hint} Pass 'auto' or one of {sorted(known)}."
