"""Picture of an [`ExtenderReport`]: which experts each layer chooses more often after tuning, and which less often."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .extender_report import ExtenderReport


CHOSEN, REST = "#2b5c8a", "#c9d6e2"


def plot_shift(report: ExtenderReport, chosen: list[int], path: str | os.PathLike[str] | None = None) -> Figure:
    """See [`ExtenderReport.plot`]; the bars of the layers in `chosen` are dark."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "ExtenderReport.plot draws with matplotlib, which is not installed. Run `pip install peft-moe[plots]`."
        ) from error
    changes = report.changes()
    layers = list(changes)
    num_experts = max(map(len, changes.values()))
    grid = [entry + [math.nan] * (num_experts - len(entry)) for entry in changes.values()]
    height = min(max(0.26 * len(layers), 1.9), 9) + 1.3
    figure = Figure(figsize=(min(max(0.5 * num_experts, 1.8), 6) + 4.2, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
    image = _draw_changes(left, grid)
    shift = report.shift
    right.barh(range(len(layers)), list(shift.values()), color=[CHOSEN if n in chosen else REST for n in layers])
    right.set_title("shift, standard deviation", fontsize=10)
    right.tick_params(length=0, labelsize=8)
    right.spines[["top", "right", "left"]].set_visible(False)
    step = math.ceil(len(layers) / 40)
    left.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    left.set_xticks(range(0, num_experts, math.ceil(num_experts / 16)))
    left.set_xlabel("expert")
    left.set_ylabel("layer")
    figure.suptitle(f"Shift of expert selection, {len(chosen)} of {len(layers)} layers chosen (dark)", fontsize=12)
    colorbar = figure.colorbar(image, ax=left, fraction=0.05, pad=0.02, aspect=32)
    colorbar.ax.tick_params(labelsize=8)
    colorbar.set_label("share of choices, points", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_changes(axis: Any, grid: list[list[float]]) -> Any:
    from matplotlib import colormaps

    points = [[100 * change for change in row] for row in grid]
    largest = max(abs(change) for row in points for change in row if not math.isnan(change)) or 1.0
    colormap = colormaps["RdBu_r"].with_extremes(bad="0.9")
    image = axis.imshow(points, vmin=-largest, vmax=largest, cmap=colormap, aspect="auto", interpolation="nearest")
    axis.set_title("after − before", fontsize=10)
    axis.tick_params(length=0, labelsize=8)
    axis.set_frame_on(False)
    if len(points) <= 40 and len(points[0]) <= 10:
        for row, entries in enumerate(points):
            for column, change in enumerate(entries):
                if not math.isnan(change):
                    color = "white" if abs(change) > 0.6 * largest else "black"
                    axis.text(column, row, f"{change:+.0f}", ha="center", va="center", fontsize=7, color=color)
    return image
