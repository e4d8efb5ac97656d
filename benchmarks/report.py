"""Prints a result file of `lora_experts.py`: every cell, then geometric means against the targets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any


Cell = dict[str, Any]

# what, numerator, denominator, which cells, limit, whether the ratio has to stay below the limit
TARGETS: list[tuple[str, str, str, Callable[[Cell], bool], float, bool]] = [
    ("top-1 against LoRA of rank r, T >= 1024", "auto", "peft_r", lambda c: is_train(c, 1), 1.00, True),
    ("top-2 against LoRA of rank r, T >= 1024", "auto", "peft_r", lambda c: is_train(c, 2), 1.15, True),
    ("top-2 against LoRA of rank 2r, T >= 1024", "auto", "peft_kr", lambda c: is_train(c, 2), 1.10, True),
    (
        "MoE-PEFT style loop over auto, E = 32, T >= 1024",
        "loop",
        "auto",
        lambda c: is_train(c) and experts(c) == 32,
        2.5,
        False,
    ),
    ("lean loop (eager) over auto, T >= 1024", "eager", "auto", lambda c: is_train(c), 1.5, False),
    ("decode against LoRA of rank r, T = 1", "auto", "peft_r", lambda c: c["kind"] == "decode", 1.15, True),
    ("small T against LoRA of rank r, 1 < T < 1024", "auto", "peft_r", lambda c: c["kind"] == "small", 1.15, True),
]


def is_train(cell: Cell, top_k: int | None = None) -> bool:
    """Whether a cell has T >= 1024, and this top-k."""
    return bool(cell["kind"] == "train" and top_k in (None, cell["shape"]["top_k"]))


def experts(cell: Cell) -> int:
    """E of a cell."""
    return int(cell["shape"]["num_experts"])


def geomean(values: list[float]) -> float:
    """Geometric mean; not a number for no values."""
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def shape_name(cell: Cell) -> str:
    """The shape of a cell in one word per axis."""
    shape = cell["shape"]
    return (
        f"{shape['in_features']}x{shape['out_features']} T{shape['num_tokens']} E{shape['num_experts']} "
        f"r{shape['rank']} k{shape['top_k']} {shape['routing']}"
    )


def print_report(result: dict[str, Any]) -> None:
    """Every cell as time over PEFT's LoRA of rank r, then the targets."""
    cells = result["cells"]
    names = sorted({name for cell in cells for name in cell["median_ms"]} - {"peft_r"})
    print(f"{'time / peft LoRA of rank r':<38}{'peft ms':>9}{'iqr%':>6}" + "".join(f"{name:>11}" for name in names))
    for cell in cells:
        times = cell["median_ms"]
        peft = times["peft_r"]
        ratios = "".join(f"{times[name] / peft:>11.2f}" if name in times else f"{'-':>11}" for name in names)
        print(
            f"{shape_name(cell):<38}{peft:>9.3f}{cell['iqr_ms']['peft_r'] / peft * 100:>6.0f}{ratios}  {cell['auto']}"
        )
    print(f"\n{'geometric means':<50}{'cells':>6}{'found':>8}{'target':>9}")
    for what, over, under, belongs, limit, below in TARGETS:
        able = [c["median_ms"] for c in cells if belongs(c) and {over, under} <= set(c["median_ms"])]
        ratios_found = [times[over] / times[under] for times in able]
        value = geomean(ratios_found)
        verdict = "" if not ratios_found else "met" if (value <= limit) == below else "MISSED"
        print(f"{what:<50}{len(ratios_found):>6}{value:>8.2f}{'<=' if below else '>=':>4} {limit:.2f} {verdict}")
    for what, with_gradients in (("peak memory over rank-r LoRA", True), ("  without gradients of A and B", False)):
        ratios_found = [
            peak(c, "auto", with_gradients) / peak(c, "peft_r", with_gradients) for c in cells if is_train(c)
        ]
        print(f"{what:<50}{len(ratios_found):>6}{geomean(ratios_found):>8.2f}  <= 1.10")


def peak(cell: Cell, name: str, with_gradients: bool) -> float:
    """Peak memory of a step in MiB; E experts have E times the gradients of one, whatever the kernel does."""
    shape = cell["shape"]
    experts_held = shape["num_experts"] if name == "auto" else 1
    gradients = experts_held * shape["rank"] * (shape["in_features"] + shape["out_features"]) * 4 / 2**20
    return float(cell["peak_mib"][name]) - (0.0 if with_gradients else gradients)


if __name__ == "__main__":
    print_report(json.loads(Path(sys.argv[1]).read_text()))
