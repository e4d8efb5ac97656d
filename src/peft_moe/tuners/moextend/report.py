"""What the Extender found: how far the choices of each layer shifted, and the configuration that follows from it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import is_positive_int
from .config import MoExtendConfig


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

REPORT_FORMAT = 1
COPY_SOURCES = ("original", "tuned")
CHOSEN, REST = "#2b5c8a", "#c9d6e2"
"""colours of the bars of layers that get new experts, and of the others"""


def selection_shift(before: Mapping[int, Sequence[int]], after: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """How far the experts that each layer chooses have shifted between two models.

    `d_j = Std_i(R_ij(κ) − R_ij(κ'))`, where `R_ij` is the share of expert `i` in the choices of layer `j` (MoExtend,
    section on the Extender). The standard deviation is that of the population (divided by E); the released code
    divides by E − 1, which changes no ranking of layers with equal numbers of experts.

    Args:
        before (`Mapping[int, Sequence[int]]`), after (`Mapping[int, Sequence[int]]`):
            Layer → how often each of its E experts was chosen by the one and by the other model.

    Returns:
        `dict[int, float]`: layer → shift, from 0 (same shares) to at most `sqrt(2 / E)`.

    Raises:
        ValueError: the two have other layers or numbers of experts, or a layer has no counts.

    Example:

    ```py
    >>> selection_shift({0: [6, 2]}, {0: [2, 6]})
    {0: 0.5}
    ```
    """
    if list(before) != list(after):
        raise ValueError(
            f"Both counts must have the same layers in the same order, but have {list(before)} and {list(after)}."
        )
    return {layer: _shift_of(layer, before[layer], after[layer]) for layer in before}


def _shift_of(layer: int, before: Sequence[int], after: Sequence[int]) -> float:
    if len(before) != len(after) or not sum(before) or not sum(after):
        raise ValueError(
            f"Layer {layer} needs counts of the same experts twice, at least one choice each, but has {list(before)} "
            f"and {list(after)}."
        )
    # both sets of shares sum to 1, so the mean of the differences is 0
    return math.sqrt(sum(change**2 for change in _changes(before, after)) / len(before))


def _changes(before: Sequence[int], after: Sequence[int]) -> list[float]:
    """Change of each expert's share, from before to after."""
    return [now / sum(after) - was / sum(before) for was, now in zip(before, after, strict=True)]


@dataclass(frozen=True)
class ExtenderReport:
    """How the choices of each layer shifted when its router was tuned; `print` shows it as a table in markdown.

    Args:
        before (`dict[int, list[int]]`), after (`dict[int, list[int]]`):
            Layer → how often each of its E experts was chosen on the probe set, with the original routers (κ) and with
            the tuned ones (κ'). A token that visits K experts counts K times, padding does not count.
        blocks (`dict[int, str]`): layer → name of its mixture of experts in the model.
        num_probe_tokens (`int`): tokens of the probe set that are no padding, over all processes.
        losses (`list[float]`): training loss in nats per token at each log, the balance loss included.
        settings (`dict[str, Any]`):
            What was asked for: `steps`, `learning_rate`, `batch_size`, and as `router_aux_loss_coef` the weight of the
            balance loss that was in effect.
    """

    before: dict[int, list[int]]
    after: dict[int, list[int]]
    blocks: dict[int, str]
    num_probe_tokens: int
    losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shift(self) -> dict[int, float]:
        """Layer → [`selection_shift`]."""
        return selection_shift(self.before, self.after)

    @property
    def ranking(self) -> list[int]:
        """Layers, the one that shifted most first; of equal ones the lower first."""
        shift = self.shift
        return sorted(shift, key=lambda layer: (-shift[layer], layer))

    def choose_layers(
        self, p: float = 0.5, *, num_new_experts: int = 1, copy_source: str = "original", **config_fields: Any
    ) -> MoExtendConfig:
        """The configuration that gives new experts to the `⌊p · L⌋` of L layers that shifted most.

        Args:
            p (`float`): share of the layers, in (0, 1]. Paper: 0.5.
            num_new_experts (`int`): per layer. Paper: 1. Several copy the most used experts, one each.
            copy_source (`"original"` or `"tuned"`):
                A new expert copies the one that was used most with the original routers (paper, eq. 8), or with the
                tuned ones (released code).
            config_fields: further fields of [`MoExtendConfig`], e.g. `task_type="CAUSAL_LM"`.

        Raises:
            ValueError: `p` chooses no layer, no layer shifted at all, or another argument makes no sense.

        Example:

        ```py
        >>> model = get_peft_model(model, report.choose_layers(p=0.5, task_type="CAUSAL_LM"))
        ```
        """
        if wrong := sorted({"layers", "copy_sources"} & set(config_fields)):
            raise ValueError(f"choose_layers finds {wrong} itself. Build a MoExtendConfig to say them by hand.")
        layers = sorted(self.ranking[: self._num_layers(p)])
        if not any(self.shift.values()):
            raise ValueError(
                "No layer chose other experts after tuning, so that there is no ranking. Measure with more steps, a "
                "higher learning rate or a larger probe set."
            )
        if still := [layer for layer in layers if not self.shift[layer]]:
            logger.warning(f"Layers {still} are among the chosen ones, but did not shift at all. Choose a smaller p.")
        sources = self.copy_sources(layers, num_new_experts=num_new_experts, copy_source=copy_source)
        return MoExtendConfig(num_new_experts=num_new_experts, layers=layers, copy_sources=sources, **config_fields)

    def copy_sources(
        self, layers: Sequence[int], *, num_new_experts: int = 1, copy_source: str = "original"
    ) -> dict[int, int] | dict[int, list[int]]:
        """Layer → the expert that was used most, for layers that somebody else has chosen; see [`choose_layers`].

        Raises:
            ValueError: a layer was not measured, or another argument makes no sense.
        """
        if copy_source not in COPY_SOURCES:
            raise ValueError(f"copy_source must be one of {COPY_SOURCES}, but is {copy_source!r}.")
        if not is_positive_int(num_new_experts):
            raise ValueError(f"num_new_experts must be a whole number of at least 1, but is {num_new_experts!r}.")
        if unknown := [layer for layer in layers if layer not in self.before]:
            raise ValueError(f"Layers {unknown} were not measured. Those that were: {list(self.before)}.")
        counts = self.before if copy_source == "original" else self.after
        found = {layer: _most_used(counts[layer], num_new_experts) for layer in layers}
        return found if num_new_experts > 1 else {layer: most[0] for layer, most in found.items()}

    def _num_layers(self, p: float) -> int:
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p <= 1:
            raise ValueError(f"p is the share of the layers that get new experts, in (0, 1], but is {p!r}.")
        num_layers = len(self.before)
        # 0.29 · 100 is a little less than 29 in floating point
        chosen = math.floor(p * num_layers + 1e-9)
        if not chosen:
            raise ValueError(
                f"p={p} of {num_layers} layers with experts is none. It must be at least {1 / num_layers:.3g}, which "
                "is one layer."
            )
        return chosen

    def table(self) -> str:
        """A table in markdown, one row per layer."""
        header = ["layer", "rank", "shift", "most used before", "most used after", "largest change"]
        ranks = {layer: rank for rank, layer in enumerate(self.ranking, start=1)}
        rows = []
        for layer, shift in self.shift.items():
            before, after = self.before[layer], self.after[layer]
            changes = _changes(before, after)
            changed = max(range(len(changes)), key=lambda expert: abs(changes[expert]))
            most = [f"{_most_used(counts, 1)[0]} ({max(counts) / sum(counts):.1%})" for counts in (before, after)]
            rows.append(
                [
                    str(layer),
                    str(ranks[layer]),
                    f"{shift:.4f}",
                    *most,
                    f"{changed} ({100 * changes[changed]:+.1f} points)",
                ]
            )
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"Shift of expert selection on {self.num_probe_tokens} tokens; {settings}\n\n" + _markdown(header, rows)

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | os.PathLike[str] | None = None, *, p: float = 0.5) -> Figure:
        """Draw the change of each expert's share, layer × expert, and beside it the shift of each layer.

        Args:
            path (`str` or `os.PathLike`, *optional*): where to save the picture; the ending says the format (`.png`).
            p (`float`): layers that [`choose_layers`] would choose are dark.

        Returns:
            `matplotlib.figure.Figure`: drawn without touching pyplot's state.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `p` chooses no layer.
        """
        figure = _figure(self, self.ranking[: self._num_layers(p)])
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def changes(self) -> dict[int, list[float]]:
        """Layer → change of each expert's share of the choices, from -1 to 1."""
        return {layer: _changes(self.before[layer], self.after[layer]) for layer in self.before}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json."""
        by_layer = {
            str(layer): {
                "block": self.blocks[layer],
                "shift": shift,
                "before": self.before[layer],
                "after": self.after[layer],
            }
            for layer, shift in self.shift.items()
        }
        rest = {"num_probe_tokens": self.num_probe_tokens, "losses": self.losses, "settings": self.settings}
        return {"format": REPORT_FORMAT, "layers": by_layer, **rest}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ExtenderReport:
        """The report that [`to_dict`] wrote.

        Raises:
            ValueError: `table` has another format, or is not what [`to_dict`] writes.
        """
        found_format = table.get("format") if isinstance(table, dict) else None
        if found_format != REPORT_FORMAT:
            raise ValueError(f"This is no ExtenderReport of format {REPORT_FORMAT}: its format is {found_format!r}.")
        try:
            layers = {int(layer): entry for layer, entry in table["layers"].items()}
            report = cls(
                before={layer: entry["before"] for layer, entry in layers.items()},
                after={layer: entry["after"] for layer, entry in layers.items()},
                blocks={layer: entry["block"] for layer, entry in layers.items()},
                num_probe_tokens=table["num_probe_tokens"],
                losses=table["losses"],
                settings=table["settings"],
            )
            selection_shift(report.before, report.after)  # are these counts?
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"This ExtenderReport is damaged ({type(error).__name__}: {error}). Measure again."
            ) from error
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as json."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ExtenderReport:
        """The report that [`save`] wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with open(path, encoding="utf-8") as file:
            try:
                return cls.from_dict(json.load(file))
            except (ValueError, RecursionError) as error:  # not json, not text or no report
                raise ValueError(f"{os.fspath(path)!r} cannot be read as an ExtenderReport: {error}") from error


def _most_used(counts: Sequence[int], number: int) -> list[int]:
    """The experts that were chosen most often, of equal ones the lower first; from the start again if there are too
    few."""
    ranked = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    return [ranked[index % len(ranked)] for index in range(number)]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _figure(report: ExtenderReport, chosen: list[int]) -> Figure:
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
