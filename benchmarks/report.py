"""Prints a result file of `lora_experts.py`: every cell, then geometric means against the targets.

python benchmarks/report.py benchmarks/results/cpu_fp32.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

from roofline import floor_ms

from peft_moe.kernels import BACKENDS


Cell = dict[str, Any]


class Target(NamedTuple):
    """A ratio of two contenders over some cells; `at_most` says from which side the limit must hold."""

    what: str
    over: str
    under: str
    belongs: Callable[[Cell], bool]
    limit: float
    at_most: bool = True
    of_graphs: bool = False


def is_train(cell: Cell, top_k: int | None = None, num_experts: int | None = None, at_least: int = 1024) -> bool:
    """Whether a cell is a training step of so many tokens at least, with this K and E."""
    shape = cell["shape"]
    return bool(
        cell["kind"] == "train"
        and shape["num_tokens"] >= at_least
        and top_k in (None, shape["top_k"])
        and num_experts in (None, shape["num_experts"])
    )


def is_large(cell: Cell, top_k: int | None = None, num_experts: int | None = None) -> bool:
    """Whether a cell is a training step of a linear of a 7B model, with 4096 tokens or more."""
    return is_train(cell, top_k, num_experts, 4096) and cell["shape"]["in_features"] == 4096


def total_rank(cell: Cell) -> int:
    """E·R."""
    return int(cell["shape"]["num_experts"] * cell["shape"]["rank"])


CPU_TARGETS = [
    Target("top-1 against LoRA of rank r, T >= 1024", "auto", "peft_r", lambda c: is_train(c, 1), 1.00),
    Target("top-2 against LoRA of rank r, T >= 1024", "auto", "peft_r", lambda c: is_train(c, 2), 1.15),
    Target("top-2 against LoRA of rank 2r, T >= 1024", "auto", "peft_kr", lambda c: is_train(c, 2), 1.10),
    Target(
        "MoE-PEFT style loop over auto, E = 32, T >= 1024", "loop", "auto", lambda c: is_train(c, None, 32), 2.5, False
    ),
    Target("lean loop (eager) over auto, T >= 1024", "eager", "auto", is_train, 1.5, False),
    Target("decode against LoRA of rank r, T = 1", "auto", "peft_r", lambda c: c["kind"] == "decode", 1.15),
    Target("small T against LoRA of rank r, 1 < T < 1024", "auto", "peft_r", lambda c: c["kind"] == "small", 1.15),
]
CUDA_TARGETS = [
    Target(
        "top-1, E·r <= 256, T >= 4096, against LoRA of rank r",
        "auto",
        "peft_r",
        lambda c: is_large(c, 1) and total_rank(c) <= 256,
        0.90,
    ),
    Target(
        "top-2, E·r <= 256, T >= 4096, against LoRA of rank r",
        "auto",
        "peft_r",
        lambda c: is_large(c, 2) and total_rank(c) <= 256,
        0.92,
    ),
    Target(
        "top-2, E·r = 2048, T >= 4096, against LoRA of rank r",
        "auto",
        "peft_r",
        lambda c: is_large(c, 2) and total_rank(c) == 2048,
        1.05,
    ),
    Target("top-2, T >= 4096, against LoRA of rank 2r", "auto", "peft_kr", lambda c: is_large(c, 2), 0.95),
    Target(
        "lean loop (eager) over auto, E = 8, T = 4096", "eager", "auto", lambda c: is_large(c, None, 8), 2.0, False
    ),
    Target(
        "lean loop (eager) over auto, E = 32, T = 4096", "eager", "auto", lambda c: is_large(c, None, 32), 4.5, False
    ),
    Target(
        "ScatterMoE's pair over auto, r <= 32, T >= 4096",
        "scattermoe",
        "auto",
        lambda c: is_large(c) and c["shape"]["rank"] <= 32,
        2.0,
        False,
    ),
    Target(
        "share of the roofline, 4096x4096, T >= 4096",
        "floor",
        "auto",
        lambda c: is_large(c) and c["shape"]["out_features"] == 4096,
        0.80,
        False,
    ),
    Target(
        "share of the roofline, 4096x11008, T >= 4096",
        "floor",
        "auto",
        lambda c: is_large(c) and c["shape"]["out_features"] == 11008,
        0.87,
        False,
    ),
    Target(
        "decode against LoRA of rank r, T = 1, replayed",
        "auto",
        "peft_r",
        lambda c: c["shape"]["num_tokens"] == 1,
        1.10,
        True,
        True,
    ),
]


def geomean(values: list[float]) -> float:
    """Geometric mean; not a number for no values."""
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def shape_name(cell: Cell) -> str:
    """The shape of a cell in one word per axis."""
    shape = cell["shape"]
    return (
        f"{shape['in_features']}x{shape['out_features']} T{shape['num_tokens']} E{shape['num_experts']} "
        f"r{shape['rank']} k{shape['top_k']} {shape['routing']}{' forward' if shape.get('forward_only') else ''}"
    )


def times_of(cell: Cell, result: dict[str, Any], of_graphs: bool = False) -> dict[str, float]:
    """Milliseconds by contender; `best` is the fastest backend, known afterwards only, `floor` the roofline's time."""
    times: dict[str, float] = dict(cell.get("graph_median_ms", {}) if of_graphs else cell["median_ms"])
    found = [times[name] for name in BACKENDS if name in times]
    if found:
        times["best"] = min(found)
    if "ceilings" in result:
        times["floor"] = floor_ms(cell["floor"], result["ceilings"])
    return times


def print_cells(result: dict[str, Any], of_graphs: bool) -> None:
    """Every cell as time over PEFT's LoRA of rank r."""
    rows = [(cell, times_of(cell, result, of_graphs)) for cell in result["cells"]]
    rows = [(cell, times) for cell, times in rows if "peft_r" in times]
    if not rows:
        return
    names = sorted({name for _, times in rows for name in times} - {"peft_r"})
    widths = {name: max(9, len(name) + 2) for name in names}
    head = "graph" if of_graphs else "time"
    print(
        f"\n{head + ' / peft LoRA of rank r':<46}{'peft ms':>9}{'iqr%':>6}"
        + "".join(f"{name:>{width}}" for name, width in widths.items())
    )
    for cell, times in rows:
        peft, spread = times["peft_r"], cell["graph_iqr_ms" if of_graphs else "iqr_ms"]["peft_r"]
        ratios = "".join(
            f"{times[name] / peft:>{width}.2f}" if name in times else f"{'-':>{width}}"
            for name, width in widths.items()
        )
        print(f"{shape_name(cell):<46}{peft:>9.3f}{spread / peft * 100:>6.0f}{ratios}  {cell['auto']}")


def print_roofline(result: dict[str, Any]) -> None:
    """What each contender reaches of both ceilings, counting the least work of the cell."""
    ceilings = result.get("ceilings")
    if not ceilings:
        return
    print(f"\nceilings of this run: {ceilings['gb_per_s']:.0f} GB/s copied, {ceilings['tflops']:.1f} TFLOP/s")
    print(f"{'':<46}{'contender':<18}{'TFLOP/s':>9}{'GB/s':>9}{'roofline':>10}{'peak MiB':>10}")
    for cell in result["cells"]:
        times, work = times_of(cell, result), cell["floor"]
        for name in [name for name in cell["median_ms"] if name not in ("base", "base_again", "loop")]:
            rates = f"{work['flops'] / times[name] / 1e9:>9.1f}{work['bytes'] / times[name] / 1e6:>9.0f}"
            share = f"{times['floor'] / times[name]:>9.0%} {cell['peak_mib'][name]:>10.1f}"
            print(f"{shape_name(cell):<46}{name:<18}{rates} {share}")


def print_targets(result: dict[str, Any]) -> None:
    """Geometric means against the targets of the device; how `best` would fare stands beside it."""
    cells = result["cells"]
    targets = CUDA_TARGETS if result["hardware"]["device"] == "cuda" else CPU_TARGETS
    print(f"\n{'geometric means':<58}{'cells':>6}{'found':>8}{'target':>9}")
    for target in targets:
        rows = [times_of(cell, result, target.of_graphs) for cell in cells if target.belongs(cell)]
        found = [row[target.over] / row[target.under] for row in rows if {target.over, target.under} <= set(row)]
        value = geomean(found)
        verdict = "" if not found else "met" if (value <= target.limit) == target.at_most else "MISSED"
        sign = "<=" if target.at_most else ">="
        over, under = ("best" if name == "auto" else name for name in (target.over, target.under))
        best = geomean([row[over] / row[under] for row in rows if {over, under} <= set(row)])
        print(
            f"{target.what:<58}{len(found):>6}{value:>8.2f}{sign:>4} {target.limit:.2f} {verdict:<7}(best {best:.2f})"
        )
    for what, with_gradients in (("peak memory over rank-r LoRA", True), ("  without gradients of A and B", False)):
        able = [c for c in cells if is_train(c) and {"auto", "peft_r"} <= set(c["peak_mib"])]
        ratios = [peak(c, "auto", with_gradients, result) / peak(c, "peft_r", with_gradients, result) for c in able]
        print(f"{what:<58}{len(ratios):>6}{geomean(ratios):>8.2f}  <= 1.10")
    noise = [max(row["base_again"] / row["base"], row["base"] / row["base_again"])
             for row in (cell["median_ms"] for cell in cells) if {"base", "base_again"} <= set(row)]  # fmt: skip
    if noise:
        print(f"two copies of the bare layer differ by a factor of {geomean(noise):.3f}, at most {max(noise):.3f}")


def peak(cell: Cell, name: str, with_gradients: bool, result: dict[str, Any]) -> float:
    """Peak memory of a step in MiB; E experts have E times the gradients of one, whatever the kernel does."""
    shape = cell["shape"]
    experts_held = shape["num_experts"] if name == "auto" else 1
    itemsize = 2 if result["dtype"] == "bfloat16" else 4
    gradients = experts_held * shape["rank"] * (shape["in_features"] + shape["out_features"]) * itemsize / 2**20
    return float(cell["peak_mib"][name]) - (0.0 if with_gradients else gradients)


def print_what_is_missing(result: dict[str, Any]) -> None:
    """Contenders without a time and why; shapes that were not reached."""
    reasons = {f"{name}: {why}" for cell in result["cells"] for name, why in cell.get("not_run", {}).items()}
    for reason in sorted(reasons):
        print(f"not run: {reason}")
    for shape in result.get("not_reached", []):
        print(f"not reached: {shape}")


def print_report(result: dict[str, Any]) -> None:
    """All tables; the targets come last."""
    print_roofline(result)
    for of_graphs in (False, True):
        print_cells(result, of_graphs)
    print_what_is_missing(result)
    print_targets(result)


if __name__ == "__main__":
    print_report(json.loads(Path(sys.argv[1]).read_text()))
