"""The memory of this process on the CPU, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def mib_of(run: Callable[[], object]) -> float:
    """The most that this process holds while `run` runs twice, beyond what it holds now."""
    # the peak begins anew; ru_maxrss would hold that of building, and that of the process which started this one
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    for _ in range(2):
        run()
    return status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    """What Linux says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10
