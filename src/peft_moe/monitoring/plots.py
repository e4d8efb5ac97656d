"""Heat maps of expert load, router × expert, one panel per domain or per token group."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from .expert_load import ExpertLoad
from .report import router_labels
from .summary import load_shares


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_COLUMNS = 4


def plot_expert_load(
    load: ExpertLoad,
    path: str | os.PathLike[str] | None = None,
    *,
    by: str = "domain",
    adapter: str | None = None,
    title: str = "Expert load",
) -> Figure:
    """Draw the share of each expert, one panel per domain or token group, all on one colour scale.

    Args:
        load (`ExpertLoad`): the counts.
        path (`str` or `os.PathLike`, *optional*): where to save the picture; the ending says the format (`.png`).
        by (`"domain"` or `"token_group"`): what the panels are.
        adapter (`str`, *optional*): only this adapter.
        title (`str`): what stands above the panels.

    Returns:
        `matplotlib.figure.Figure`: drawn without touching pyplot's state.

    Example:

    ```py
    >>> plot_expert_load(load, "expert_load.png")
    ```

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was counted, or another `by`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_expert_load draws with matplotlib, which is not installed. Run `pip install peft-moe[plots]`."
        ) from error
    panels = {name: table for name, table in load.split(by, adapter=adapter).items() if any(map(any, table.values()))}
    if not panels:
        raise ValueError("There is no expert load to plot: no forward pass was counted.")
    names = list(dict.fromkeys(name for table in panels.values() for name in table))
    num_experts = max(len(counts) for table in panels.values() for counts in table.values())
    num_rows = math.ceil(len(panels) / MAX_COLUMNS)
    num_columns = math.ceil(len(panels) / num_rows)
    width = num_columns * min(max(0.5 * num_experts, 1.8), 4.5) + 1.8
    height = num_rows * (min(max(0.26 * len(names), 1.5), 9) + 0.6) + 0.7
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    grids = {panel: _grid(table, names, num_experts) for panel, table in panels.items()}
    largest = max(share for grid in grids.values() for row in grid for share in row if not math.isnan(share))
    drawn = zip(axes.flat, grids.items(), strict=False)
    images = [_draw_panel(axis, grid, panel, largest) for axis, (panel, grid) in drawn]
    for axis in list(axes.flat)[len(grids) :]:
        axis.set_visible(False)
    _label_axes(axes, names, num_experts, num_panels=len(grids))
    figure.suptitle(title, fontsize=12)
    colorbar = figure.colorbar(images[0], ax=axes, fraction=0.05, pad=0.02, aspect=32)
    colorbar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    colorbar.ax.tick_params(labelsize=8)
    colorbar.set_label("share of choices, %", fontsize=9)
    _mark_balanced(colorbar, {len(counts) for table in panels.values() for counts in table.values()})
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _grid(table: dict[str, list[int]], names: list[str], num_experts: int) -> list[list[float]]:
    """Shares, one row per router; `nan` for experts that a router does not have or where it saw no token."""
    grid = []
    for name in names:
        counts = table.get(name, [])
        shares = load_shares(counts) if any(counts) else []
        grid.append(shares + [math.nan] * (num_experts - len(shares)))
    return grid


def _draw_panel(axis: Any, grid: list[list[float]], panel: str, largest: float) -> Any:
    from matplotlib import colormaps

    colormap = colormaps["viridis"].with_extremes(bad="0.9")
    image = axis.imshow(grid, vmin=0.0, vmax=largest, cmap=colormap, aspect="auto", interpolation="nearest")
    axis.set_title(panel, fontsize=10)
    axis.tick_params(length=0, labelsize=8)
    axis.set_frame_on(False)
    if len(grid) <= 40 and len(grid[0]) <= 10:
        for row, shares in enumerate(grid):
            for column, share in enumerate(shares):
                if not math.isnan(share):
                    color = "black" if share > 0.6 * largest else "white"
                    axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image


def _label_axes(axes: Any, names: list[str], num_experts: int, *, num_panels: int) -> None:
    labels = router_labels(names)
    row_step, column_step = math.ceil(len(names) / 40), math.ceil(num_experts / 16)
    axes[0, 0].set_yticks(range(0, len(names), row_step), labels[::row_step])
    axes[0, 0].set_xticks(range(0, num_experts, column_step))
    for axis in axes[:, 0]:
        axis.set_ylabel("layer" if all(label.isdigit() for label in labels) else "router")
    for index, axis in enumerate(axes.flat):
        if index < num_panels <= index + axes.shape[1]:
            axis.set_xlabel("expert")
            axis.tick_params(labelbottom=True)


def _mark_balanced(colorbar: Any, num_experts: set[int]) -> None:
    """A line on the colour bar at `1 / E`, where all routers have the same E."""
    if len(num_experts) == 1:
        balanced = 1 / num_experts.pop()
        colorbar.ax.axhline(balanced, color="white", linewidth=2.5)
        colorbar.ax.axhline(balanced, color="black", linewidth=1)
        position = colorbar.ax.get_yaxis_transform()
        colorbar.ax.text(
            -0.3, balanced, "balanced", ha="right", va="center", fontsize=8, rotation=90, transform=position
        )
