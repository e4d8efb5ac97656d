"""Pictures of expert load, of modalities and of pathways, drawn with matplotlib."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from .expert_load import ExpertLoad
from .modality import modality_shares
from .pathways import ExpertPathways, Pathway
from .report import router_labels
from .summary import load_shares


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_COLUMNS = 4
SHARES, PREFERENCE = "viridis", "coolwarm"
MAX_COLORS = 20
MIN_FONT_SIZE = 3.5


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
    figure_class = _figure_class("plot_expert_load")
    panels = {name: table for name, table in load.split(by, adapter=adapter).items() if any(map(any, table.values()))}
    if not panels:
        raise ValueError("There is no expert load to plot: no forward pass was counted.")
    names = list(dict.fromkeys(name for table in panels.values() for name in table))
    num_experts = max(len(counts) for table in panels.values() for counts in table.values())
    num_rows = math.ceil(len(panels) / MAX_COLUMNS)
    num_columns = math.ceil(len(panels) / num_rows)
    width, height = _panel_size(len(names), num_experts)
    figure = figure_class(figsize=(num_columns * width + 1.8, num_rows * (height + 0.6) + 0.7), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    grids = {panel: _grid(table, names, num_experts) for panel, table in panels.items()}
    image = _draw_panels(axes, grids)
    for axis in list(axes.flat)[len(grids) :]:
        axis.set_visible(False)
    _label_axes(axes, names, num_experts, num_panels=len(grids))
    colorbar = _add_colorbar(figure, image, axes, "share of choices, %")
    _mark_balanced(colorbar, {len(counts) for table in panels.values() for counts in table.values()})
    return _finished(figure, title, path)


def plot_modality(
    load: ExpertLoad,
    path: str | os.PathLike[str] | None = None,
    *,
    adapter: str | None = None,
    title: str = "Experts by modality",
) -> Figure:
    """Draw [`modality_shares`] as four heat maps, layer × expert (MoE-LLaVA, figures 4 and 5).

    Args:
        load (`ExpertLoad`): counts by token group.
        path (`str` or `os.PathLike`, *optional*): where to save the picture; the ending says the format (`.png`).
        adapter (`str`, *optional*): only this adapter.
        title (`str`): what stands above the panels.

    Returns:
        `matplotlib.figure.Figure`: drawn without touching pyplot's state.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no router saw tokens of both kinds.
    """
    figure_class = _figure_class("plot_modality")
    shares = modality_shares(load, adapter=adapter)
    names = list(shares)
    num_experts = max(len(entry.text) for entry in shares.values())
    panels = {
        "both, with equal weight": [entry.balanced for entry in shares.values()],
        "text": [entry.text for entry in shares.values()],
        "image": [entry.image for entry in shares.values()],
    }
    grids = {panel: [_padded(row, num_experts) for row in rows] for panel, rows in panels.items()}
    width, height = _panel_size(len(names), num_experts)
    figure = figure_class(figsize=(4 * width + 3.2, height + 1.3), layout="constrained")
    axes = figure.subplots(1, 4, sharex=True, sharey=True, squeeze=False)
    image = _draw_panels(axes, grids)
    fractions = [_padded(entry.image_fraction, num_experts) for entry in shares.values()]
    preference = _draw_heat_map(axes[0, 3], fractions, "image part of each expert", 1.0, colormap=PREFERENCE)
    _label_axes(axes, names, num_experts, num_panels=4)
    colorbar = _add_colorbar(figure, image, axes[0, :3], "share of tokens, %")
    _mark_balanced(colorbar, {len(entry.text) for entry in shares.values()})
    _add_colorbar(figure, preference, axes[0, 3], "image part, % (50: neutral)", fraction=0.15)
    return _finished(figure, title, path)


def plot_pathways(
    pathways: ExpertPathways, path: str | os.PathLike[str] | None = None, *, n: int = 10, title: str | None = None
) -> Figure:
    """Draw the `n` most common pathways of each stack of layers and token group (MoE-LLaVA, figure 6).

    Each row is a pathway, each column a layer, each number the expert that is chosen there (left out where sets of
    many experts would not be readable; colours tell them apart). Bars are shares of tokens; a
    black line says what the share would be if layers chose independently.

    Args:
        pathways (`ExpertPathways`): the counts.
        path (`str` or `os.PathLike`, *optional*): where to save the picture; the ending says the format (`.png`).
        n (`int`): how many pathways.
        title (`str`, *optional*): what stands above the panels.

    Returns:
        `matplotlib.figure.Figure`: drawn without touching pyplot's state.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was counted.
    """
    figure_class = _figure_class("plot_pathways")
    stacks = pathways.stacks
    panels = {
        (stack, group): pathways.top(n, token_group=group, stack=stack)
        for stack, key in stacks.items()
        for group in pathways.counts[key]
    }
    if not panels:
        raise ValueError("There are no pathways to plot: no forward pass was counted.")
    colors = _colors_of({choice for found in panels.values() for entry in found for choice in entry.experts})
    num_layers = max(len(key.routers) for key in stacks.values())
    widest = max(len(_shown(choice)) for choice in colors)
    grid_width = min(max(num_layers * (0.3 + 0.08 * (widest - 1)), 1.2), 14)
    heights = [0.25 * len(found) + 0.9 for found in panels.values()]
    figure = figure_class(figsize=(grid_width + 4.6, sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False, width_ratios=[grid_width, 3.6], height_ratios=heights)
    largest = max(max(entry.share, entry.independent_share) for found in panels.values() for entry in found)
    for (grid, bars), ((stack, group), found) in zip(axes, panels.items(), strict=True):
        labels = router_labels(stacks[stack].routers)
        _draw_pathways(grid, found, labels, colors, cell_width=grid_width / num_layers)
        grid.set_title(f"{group} tokens" if len(stacks) == 1 else f"{stack}, {group} tokens", fontsize=10)
        _draw_shares(bars, found, largest)
        summary = pathways.summary(n, token_group=group, stack=stack)
        bars.set_title(
            f"{len(found)} of {summary['num_pathways']:,} distinct pathways, taken by "
            f"{100 * summary['top_share']:.3g}% of {summary['num_tokens']:,} tokens",
            fontsize=8,
        )
    figure.legend(
        *axes[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8, frameon=False
    )
    return _finished(figure, title or f"The {n} most common pathways", path)


def _figure_class(function: str) -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{function} draws with matplotlib, which is not installed. Run `pip install peft-moe[plots]`."
        ) from error
    return Figure


def _finished(figure: Figure, title: str, path: str | os.PathLike[str] | None) -> Figure:
    figure.suptitle(title, fontsize=12)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_panels(axes: Any, grids: dict[str, list[list[float]]]) -> Any:
    """Heat maps on one colour scale; the first of them, for the colour bar."""
    largest = max(share for grid in grids.values() for row in grid for share in row if not math.isnan(share))
    drawn = zip(axes.flat, grids.items(), strict=False)
    return [_draw_heat_map(axis, grid, panel, largest) for axis, (panel, grid) in drawn][0]


def _panel_size(num_rows: int, num_experts: int) -> tuple[float, float]:
    """Width and height of a heat map, inches."""
    return min(max(0.5 * num_experts, 1.8), 4.5), min(max(0.26 * num_rows, 1.5), 9)


def _grid(table: dict[str, list[int]], names: list[str], num_experts: int) -> list[list[float]]:
    """Shares, one row per router; `nan` for experts that a router does not have or where it saw no token."""
    rows = [table.get(name, []) for name in names]
    return [_padded(load_shares(counts) if any(counts) else [], num_experts) for counts in rows]


def _padded(row: list[float], num_experts: int) -> list[float]:
    return row + [math.nan] * (num_experts - len(row))


def _draw_heat_map(axis: Any, grid: list[list[float]], panel: str, largest: float, *, colormap: str = SHARES) -> Any:
    from matplotlib import colormaps

    chosen = colormaps[colormap].with_extremes(bad="0.9")
    image = axis.imshow(grid, vmin=0.0, vmax=largest, cmap=chosen, aspect="auto", interpolation="nearest")
    axis.set_title(panel, fontsize=10)
    axis.tick_params(length=0, labelsize=8)
    axis.set_frame_on(False)
    if len(grid) <= 40 and len(grid[0]) <= 10:
        for row, shares in enumerate(grid):
            for column, share in enumerate(shares):
                if not math.isnan(share):
                    color = _readable_on(image.cmap(image.norm(share)))
                    axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image


def _readable_on(color: tuple[float, ...]) -> str:
    """Black or white, whichever stands out against a background in RGB."""
    red, green, blue = color[:3]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _add_colorbar(figure: Figure, image: Any, axes: Any, label: str, *, fraction: float = 0.05) -> Any:
    colorbar = figure.colorbar(image, ax=axes, fraction=fraction, pad=0.02, aspect=32)
    colorbar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    colorbar.ax.tick_params(labelsize=8)
    colorbar.set_label(label, fontsize=9)
    return colorbar


def _shown(choice: tuple[int, ...]) -> str:
    return "+".join(map(str, choice))


def _colors_of(choices: set[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[float, ...]]:
    """A colour for each expert, or each set of experts; neighbours differ clearly where there are not too many."""
    from matplotlib import colormaps

    ordered, number = sorted(choices), len(choices)
    if number <= MAX_COLORS:
        colors = colormaps["tab10" if number <= MAX_COLORS // 2 else "tab20"]
        return {choice: colors(index) for index, choice in enumerate(ordered)}
    return {choice: colormaps["turbo"](index / (number - 1)) for index, choice in enumerate(ordered)}


def _draw_pathways(
    axis: Any, found: list[Pathway], labels: list[str], colors: dict[Any, tuple[float, ...]], *, cell_width: float
) -> None:
    axis.imshow([[colors[choice][:3] for choice in entry.experts] for entry in found], aspect="auto")
    widest = max(len(_shown(choice)) for entry in found for choice in entry.experts)
    # a digit of n points is about 0.6 n points wide
    size = min(8.0, 72 * 0.8 * cell_width / (0.6 * widest))
    for row, entry in enumerate(found if size >= MIN_FONT_SIZE else []):
        for column, choice in enumerate(entry.experts):
            color = _readable_on(colors[choice])
            axis.text(column, row, _shown(choice), ha="center", va="center", fontsize=size, color=color)
    step = math.ceil(len(labels) * max(map(len, labels)) * 0.08 / (cell_width * len(labels)))
    axis.set_xticks(range(0, len(labels), step), labels[::step])
    axis.set_yticks(range(len(found)), [str(rank + 1) for rank in range(len(found))])
    axis.set_xticks([column + 0.5 for column in range(len(labels) - 1)], minor=True)
    axis.set_yticks([row + 0.5 for row in range(len(found) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0, labelsize=8)
    axis.set_frame_on(False)
    axis.set_xlabel("layer" if all(label.isdigit() for label in labels) else "router", fontsize=9)
    axis.set_ylabel("pathway", fontsize=9)


def _draw_shares(axis: Any, found: list[Pathway], largest: float) -> None:
    rows = range(len(found))
    axis.barh(rows, [100 * entry.share for entry in found], height=0.7, color="0.72", label="share of tokens")
    expected = [100 * entry.independent_share for entry in found]
    below, above = [row - 0.35 for row in rows], [row + 0.35 for row in rows]
    axis.vlines(expected, below, above, color="black", linewidth=1.6, label="if layers were independent")
    for row, entry in enumerate(found):
        end = 100 * max(entry.share, entry.independent_share)
        label, place = f"{100 * entry.share:.3g} %, {entry.lift_label}×", {"va": "center", "fontsize": 7}
        axis.annotate(label, (end, row), xytext=(4, 0), textcoords="offset points", **place)
    axis.set_xlim(0, 140 * largest)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_yticks([])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("share of tokens, %", fontsize=9)


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
        for color, linewidth in (("white", 2.5), ("black", 1)):
            colorbar.ax.axhline(balanced, color=color, linewidth=linewidth)
        position = colorbar.ax.get_yaxis_transform()
        colorbar.ax.text(
            -0.3, balanced, "balanced", ha="right", va="center", fontsize=8, rotation=90, transform=position
        )
