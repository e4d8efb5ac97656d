"""Draws a result file of `lora_experts.py`: each contender's time over PEFT's LoRA of rank r, a point per shape.

python benchmarks/plot.py benchmarks/results/cpu_fp32_auto.json docs/images/kernels_cpu.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Cell, geomean, times_of


# left to right; a contender that a file lacks is left out
CONTENDERS = {
    "base": "frozen layer alone",
    "peft_kr": "LoRA of rank k·r",
    "auto": "peft_moe (auto)",
    "eager": "expert loop, lean",
    "loop": "expert loop as in MoE-PEFT",
    "scattermoe": "ScatterMoE's pair",
}
COLORS = {name: f"C{i}" for i, name in enumerate(("auto", "eager", "peft_kr", "loop", "scattermoe"))} | {"base": "0.6"}


def group_of(cell: Cell) -> str:
    """The panel of a cell."""
    tokens, top_k = cell["shape"]["num_tokens"], cell["shape"]["top_k"]
    size = "T = 1" if tokens == 1 else "T ≥ 1024" if tokens >= 1024 else "1 < T < 1024"
    return f"{size}, top-{top_k}"


def draw(axis: Axes, rows: list[dict[str, float]], title: str) -> None:
    """A column of points per contender, its geometric mean as a line with the number above it."""
    names = [name for name in CONTENDERS if any(name in row for row in rows)]
    for x, name in enumerate(names):
        ratios = sorted(row[name] / row["peft_r"] for row in rows if name in row)
        spread = [x + 0.25 * (2 * i / max(len(ratios) - 1, 1) - 1) for i in range(len(ratios))]
        axis.scatter(spread, ratios, s=14, color=COLORS[name], alpha=0.7, linewidths=0)
        mean = geomean(ratios)
        axis.hlines(mean, x - 0.35, x + 0.35, color=COLORS[name])
        axis.annotate(f"{mean:.2f}", (x, max(ratios)), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_title(f"{title} ({len(rows)} shapes)", fontsize=10)
    axis.set_xticks(range(len(names)), [CONTENDERS[name] for name in names], rotation=30, ha="right", fontsize=9)


def plot(result: dict[str, Any]) -> Figure:
    """A panel for each range of tokens and K, from few tokens to many."""
    panels: dict[str, list[dict[str, float]]] = {}
    for cell in sorted(result["cells"], key=lambda c: (c["shape"]["num_tokens"], c["shape"]["top_k"])):
        times = times_of(cell, result)
        if "peft_r" in times:
            panels.setdefault(group_of(cell), []).append(times)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, rows, title)
        axis.set_yscale("log")
        ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel("time / PEFT's LoRA of rank r")
    hardware = result["hardware"]
    figure.suptitle(f"one layer, {hardware.get('processor') or hardware['device']}, {result['dtype']}", fontsize=11)
    return figure


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())).savefig(sys.argv[2], dpi=120)
