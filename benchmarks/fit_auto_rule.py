"""Fits the rule behind `backend="auto"` to a result file, and says what it costs on shapes that it did not see.

    python benchmarks/fit_auto_rule.py benchmarks/results/cpu_fp32.json

Every third shape is held out. The thresholds that minimise the geometric mean of regret (time of the choice over time
of the best backend of the cell) on the others are printed with the regret on both parts. They are then written into
`src/peft_moe/kernels/auto_rule.py` by hand, so that a rule never changes without a review.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from report import geomean, shape_name


Cell = dict[str, Any]
# what the rule may choose from; `eager` and `plain` are no candidates for dispatched shapes
CANDIDATES = ("dense", "segment", "grouped_mm", "gather", "pair_loop")


class Thresholds(NamedTuple):
    """The free numbers of the rule, in the order in which its rows are tried."""

    pair_loop_pairs: int
    """`pair_loop` up to this many (token, slot) pairs."""
    dense_rank_top_1: float
    """`dense` for K = 1 up to this E·R over the smaller width ..."""
    dense_rank_top_2: float
    """... and for K > 1."""
    grouped_pairs: int
    """`grouped_mm` up to this many pairs ..."""
    grouped_rows: int
    """... and above, while an expert has at most this many rows; else `segment`."""


GRID = (
    (0, 2, 4, 8, 16),
    (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
    (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
    (0, 64, 128, 256, 512),
    (0, 32, 64, 128, 256),
)


def chosen(cell: Cell, thresholds: Thresholds) -> str:
    """What the rule takes for a cell."""
    shape = cell["shape"]
    pairs = shape["num_tokens"] * shape["top_k"]
    relative_rank = shape["num_experts"] * shape["rank"] / min(shape["in_features"], shape["out_features"])
    dense_limit = thresholds.dense_rank_top_1 if shape["top_k"] == 1 else thresholds.dense_rank_top_2
    if pairs <= thresholds.pair_loop_pairs:
        return "pair_loop"
    if relative_rank <= dense_limit:
        return "dense"
    if pairs <= thresholds.grouped_pairs or pairs <= thresholds.grouped_rows * shape["num_experts"]:
        return "grouped_mm"
    return "segment"


def regret(cell: Cell, backend: str) -> float:
    """Time of a backend over that of the best candidate."""
    times = {name: cell["median_ms"][name] for name in CANDIDATES if name in cell["median_ms"]}
    return times.get(backend, float("inf")) / min(times.values())


def total(cells: list[Cell], thresholds: Thresholds) -> float:
    """Geometric mean of regret."""
    return geomean([regret(cell, chosen(cell, thresholds)) for cell in cells])


def fit(cells: list[Cell]) -> Thresholds:
    """The best point of the grid; among equals the one with the smallest numbers, so the simplest rule."""
    return min(
        (Thresholds(*point) for point in itertools.product(*GRID)), key=lambda t: (round(total(cells, t), 4), t)
    )


def main() -> None:
    """Fit, and print what the fit is worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    cells = json.loads(parser.parse_args().result.read_text())["cells"]
    held_out = cells[::3]
    seen = [cell for cell in cells if cell not in held_out]
    thresholds = fit(seen)
    print(f"fitted on {len(seen)} shapes: {thresholds}")
    print(f"regret, fitted shapes:   {total(seen, thresholds):.3f}")
    print(f"regret, held-out shapes: {total(held_out, thresholds):.3f} ({len(held_out)} shapes)")
    print("\nalways the same backend where it can run, all shapes:")
    for name in CANDIDATES:
        able = [cell for cell in cells if name in cell["median_ms"]]
        print(f"  {name:<11}{geomean([regret(cell, name) for cell in able]):.3f} on {len(able)} shapes")
    print("\nheld-out shapes with a regret above 1.05:")
    for cell in held_out:
        backend = chosen(cell, thresholds)
        if regret(cell, backend) > 1.05:
            print(f"  {shape_name(cell):<40}{backend:<11}{regret(cell, backend):.2f}")


if __name__ == "__main__":
    main()
