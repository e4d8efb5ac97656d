"""Says what each kernel backend is worth: how much slower the choice of `auto` becomes without it.

    python benchmarks/regret.py benchmarks/results/cpu_fp32.json

The rule of `auto` is applied to the shapes of a result file, with all backends and without one at a time; the ratio of
the times is given as a geometric mean over decoding (T = 1), over T >= 1024, and over all shapes. The rule itself,
`peft_moe.kernels.backends.RULE`, is a table that is changed by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from report import geomean

from peft_moe.kernels import Case, backends


GROUPS = {
    "T = 1": lambda case: case.num_tokens == 1,
    "T >= 1024": lambda case: case.num_tokens >= 1024,
    "all": lambda case: True,
}


def case_of(cell: dict[str, Any], result: dict[str, Any]) -> Case:
    """The shape of a cell as the rule sees it."""
    names = ("num_tokens", "in_features", "out_features", "num_experts", "rank", "top_k")
    sizes = [cell["shape"][name] for name in names]
    return Case(*sizes, getattr(torch, result["dtype"]), result["hardware"]["device"])


def chosen(case: Case, times: dict[str, float], without: str | None = None) -> str | None:
    """What the rule takes among the backends that have a time, if it takes any."""
    rows = (row for row in backends.RULE if row.backend in times and row.backend != without)
    return next((row.backend for row in rows if row.fits(case)), None)


def main_of(result: dict[str, Any]) -> None:
    """Print the table of a result."""
    cells = [(case_of(cell, result), cell["median_ms"]) for cell in result["cells"]]
    cells = [cell for cell in cells if chosen(*cell)]
    print(f"{'without':<14}" + "".join(f"{name:>12}" for name in GROUPS))
    for name in sorted({row.backend for row in backends.RULE}):
        found = []
        for belongs in GROUPS.values():
            group = [(case, times) for case, times in cells if belongs(case) and chosen(case, times, name)]
            found.append(geomean([t[chosen(c, t, name)] / t[chosen(c, t)] for c, t in group]))
        print(f"{name:<14}" + "".join(f"{value:>12.3f}" for value in found))


if __name__ == "__main__":
    main_of(json.loads(Path(sys.argv[1]).read_text()))
