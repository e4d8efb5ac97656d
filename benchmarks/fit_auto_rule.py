"""Fits the rule behind `backend="auto"` to a result file, and says what it costs on shapes that it did not see.

    python benchmarks/fit_auto_rule.py benchmarks/results/cpu_fp32.json
    python benchmarks/fit_auto_rule.py benchmarks/results/cuda_lora_experts.json

The device of the file says which rows are fitted. Every third shape is held out. The thresholds that minimise the
geometric mean of regret (time of the choice over time of the best backend of the cell) on the others are printed with
the regret on both parts, and then as rows for `src/peft_moe/kernels/auto_rule.py`. They are written there by hand, so
that a rule never changes without a review. Shapes that route whole sequences have a row of their own and are not
fitted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import geomean, shape_name

from peft_moe.kernels import Case
from peft_moe.kernels.auto_rule import RULE, Row


class Cell(NamedTuple):
    """One shape: as the rule sees it, and the times of the candidates."""

    name: str
    case: Case
    times: dict[str, float]


Rows = tuple[Row, ...]


class Form(NamedTuple):
    """What a rule for a device may look like: the grid of its numbers, and the rows that they make."""

    candidates: tuple[str, ...]
    grid: dict[str, tuple[float, ...]]
    rows: Callable[..., Rows]


def cpu_rows(pair_loop_pairs: float, dense_rank_top_1: float, dense_rank_top_2: float, grouped_pairs: float) -> Rows:
    """`pair_loop`, `dense`, `grouped_mm`, `segment`, from few pairs to many."""
    return (
        Row("pair_loop", "a handful of pairs", "cpu", max_pairs=pair_loop_pairs),
        Row("dense", "few columns", "cpu", max_top_k=1, max_relative_rank=dense_rank_top_1),
        Row("dense", "several slots and few columns", "cpu", min_top_k=2, max_relative_rank=dense_rank_top_2),
        Row("grouped_mm", "few pairs", "cpu", max_pairs=grouped_pairs),
        Row("segment", "many pairs", "cpu"),
    )


def cuda_rows(
    gather_pairs: float,
    few_pairs: float,
    dense_rank_few: float,
    dense_rank_top_1: float,
    dense_rank_top_2: float,
    grouped_pairs: float,
) -> Rows:
    """`gather`, `dense`, `grouped_mm`, `triton`; where Triton is missing, `grouped_mm` takes its place."""
    return (
        Row("gather", "a handful of pairs", "cuda", max_pairs=gather_pairs),
        Row("dense", "few pairs and columns", "cuda", max_pairs=few_pairs, max_relative_rank=dense_rank_few),
        Row("dense", "few columns", "cuda", max_top_k=1, max_relative_rank=dense_rank_top_1),
        Row("dense", "several slots and few columns", "cuda", min_top_k=2, max_relative_rank=dense_rank_top_2),
        Row("grouped_mm", "few pairs", "cuda", max_pairs=grouped_pairs),
        Row("triton", "many pairs", "cuda"),
        Row("grouped_mm", "without Triton", "cuda"),
    )


RANKS = (0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5)
FORMS = {
    "cpu": Form(
        ("dense", "segment", "grouped_mm", "gather", "pair_loop"),
        {
            "pair_loop_pairs": (0, 2, 4, 8, 16),
            "dense_rank_top_1": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
            "dense_rank_top_2": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
            "grouped_pairs": (0, 64, 128, 256, 512),
        },
        cpu_rows,
    ),
    "cuda": Form(
        ("dense", "grouped_mm", "triton", "gather"),
        {
            "gather_pairs": (0, 2, 8, 32, 128),
            "few_pairs": (0, 512, 2048),
            "dense_rank_few": RANKS,
            "dense_rank_top_1": RANKS,
            "dense_rank_top_2": RANKS,
            "grouped_pairs": (0, 128, 1024, inf),
        },
        cuda_rows,
    ),
}


def never_fits(row: Row) -> bool:
    """Whether a threshold of 0 switches a row off."""
    return row.max_pairs == 0 or row.max_relative_rank == 0


def chosen(cell: Cell, rows: Rows) -> str:
    """What the rule takes for a cell: as in `auto`, the first row that fits and whose backend can run."""
    return next((row.backend for row in rows if row.backend in cell.times and row.fits(cell.case)), "none")


def regret(cell: Cell, backend: str) -> float:
    """Time of a backend over that of the best candidate."""
    return cell.times.get(backend, inf) / min(cell.times.values())


def total(cells: list[Cell], rows: Rows) -> float:
    """Geometric mean of regret."""
    return geomean([regret(cell, chosen(cell, rows)) for cell in cells])


def fit(cells: list[Cell], form: Form) -> Rows:
    """The best point of the grid; among equals the one with the smallest numbers, so the simplest rule."""
    points = itertools.product(*form.grid.values())

    def cost(point: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
        return round(total(cells, form.rows(*point)), 4), point

    return tuple(row for row in form.rows(*min(points, key=cost)) if not never_fits(row))


def read(result: dict[str, Any], form: Form, times_of: str) -> list[Cell]:
    """The cells of a result file that the rule is about, in its order."""
    cells = []
    for cell in result["cells"]:
        shape = cell["shape"]
        times = {name: cell[times_of][name] for name in form.candidates if name in cell[times_of]}
        if shape["routing"] == "sequence" or not times:
            continue
        sizes = ("num_tokens", "in_features", "out_features", "num_experts", "rank", "top_k")
        case = Case(*(shape[size] for size in sizes), getattr(torch, result["dtype"]), result["hardware"]["device"])
        cells.append(Cell(shape_name(cell), case, times))
    return cells


def as_code(row: Row) -> str:
    """A row as it stands in `auto_rule.py`."""
    given = [f'"{row.backend}"', f'"{row.because}"', f'"{row.device}"']
    changed = [name for name in Row._fields[3:] if getattr(row, name) != Row._field_defaults[name]]
    return f"    Row({', '.join([*given, *(f'{name}={getattr(row, name):g}' for name in changed)])}),"


def print_fit(cells: list[Cell], form: Form, device: str) -> None:
    """Fit to two thirds, judge on the rest, and compare with the rule as it is and with fixed choices."""
    held_out = cells[::3]
    seen = [cell for cell in cells if cell not in held_out]
    rows = fit(seen, form)
    print(f"regret of the fit, {len(seen)} fitted shapes:   {total(seen, rows):.3f}")
    print(f"regret of the fit, {len(held_out)} held-out shapes: {total(held_out, rows):.3f}")
    print(f"regret of the present rule, all shapes: {total(cells, RULE):.3f}")
    print("\nalways the same backend where it can run, all shapes:")
    for name in form.candidates:
        able = [cell for cell in cells if name in cell.times]
        if able:
            print(f"  {name:<11}{geomean([regret(cell, name) for cell in able]):.3f} on {len(able)} shapes")
    print("\nheld-out shapes with a regret above 1.05:")
    for cell in held_out:
        backend = chosen(cell, rows)
        if regret(cell, backend) > 1.05:
            print(f"  {cell.name:<46}{backend:<11}{regret(cell, backend):.2f}")
    print(f"\nrows for {device}, to be reviewed:")
    for row in rows:
        print(as_code(row))


def main() -> None:
    """Fit, and print what the fit is worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--graphs", action="store_true", help="fit to the times of replayed graphs")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    device = result["hardware"]["device"]
    form = FORMS[device]
    print_fit(read(result, form, "graph_median_ms" if options.graphs else "median_ms"), form, device)


if __name__ == "__main__":
    main()
