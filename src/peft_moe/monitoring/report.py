"""Expert load as markdown, for a model card or a terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .expert_load import ExpertLoad
from .summary import DEAD_THRESHOLD, load_shares


def router_labels(names: Sequence[str]) -> list[str]:
    """Names of routers without the parts that all of them share, in front and at the end.

    >>> router_labels(["model.layers.0.mlp", "model.layers.1.mlp"])
    ['0', '1']
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    start = len(os.path.commonprefix(parts))
    parts = [entry[start:] for entry in parts]
    end = len(os.path.commonprefix([entry[::-1] for entry in parts]))
    return [".".join(entry[: len(entry) - end]) for entry in parts]


def expert_load_report(
    load: ExpertLoad, *, by: str = "domain", adapter: str | None = None, dead_threshold: float = DEAD_THRESHOLD
) -> str:
    """A markdown report: one row per domain (or token group), then one table router × expert for each of them.

    Args:
        load (`ExpertLoad`): the counts.
        by (`"domain"` or `"token_group"`): what to split by.
        adapter (`str`, *optional*): only this adapter.
        dead_threshold (`float`): an expert below this multiple of the balanced share is dead.

    Raises:
        ValueError: nothing was counted, or another `by`.

    Example:

    ```py
    >>> print(expert_load_report(load))
    ```
    """
    panels = {name: table for name, table in load.split(by, adapter=adapter).items() if any(map(any, table.values()))}
    if not panels:
        raise ValueError("There is no expert load to report: no forward pass was counted.")
    blocks = [_overview(load, panels, by, adapter, dead_threshold)]
    for name, table in panels.items():
        blocks.append(
            f"Share of the choices of each router, {by.replace('_', ' ')} **{name}**:\n\n{_shares_table(table)}"
        )
    return "\n\n".join(blocks) + "\n"


def _overview(
    load: ExpertLoad, panels: dict[str, dict[str, list[int]]], by: str, adapter: str | None, dead_threshold: float
) -> str:
    rows = []
    for name in panels:
        summary = load.summary(adapter=adapter, dead_threshold=dead_threshold, **{by: name})
        assert summary is not None
        rows.append(
            [
                name,
                f"{summary.entropy:.3f}",
                f"{summary.max_share:.1%}",
                f"{summary.num_dead_experts} of {summary.num_experts}",
            ]
        )
    return _markdown([by.replace("_", " "), "load entropy (1 = balanced)", "largest share", "dead experts"], rows)


def _shares_table(table: dict[str, list[int]]) -> str:
    width = max(len(counts) for counts in table.values())
    rows = []
    for label, counts in zip(router_labels(list(table)), table.values(), strict=True):
        shares = [f"{share:.1%}" for share in load_shares(counts)]
        rows.append([label, *shares, *[""] * (width - len(shares)), str(sum(counts))])
    return _markdown(["router", *(f"expert {index}" for index in range(width)), "choices"], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
