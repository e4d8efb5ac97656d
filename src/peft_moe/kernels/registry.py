"""The backends found in `backends/`, by name. Filled once, at import."""

from __future__ import annotations

from . import backends
from .backend import Backend, discover


BACKENDS: dict[str, Backend] = discover(backends)


def backend_report() -> list[tuple[str, bool, str]]:
    """Every backend as `(name, whether this environment can run it, why or why not)`.

    >>> from peft_moe.kernels import backend_report
    >>> "eager" in {name for name, is_usable, _ in backend_report() if is_usable}
    True
    """
    return [(name, *backend.is_usable()) for name, backend in BACKENDS.items()]
