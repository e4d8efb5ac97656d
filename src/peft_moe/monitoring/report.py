"""Expert load, modalities and pathways as markdown, for a model card or a terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from .expert_load import ExpertLoad
from .modality import modality_shares
from .pathways import ExpertPathways
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
    overview = []
    for name in panels:
        summary = load.summary(adapter=adapter, dead_threshold=dead_threshold, **{by: name})
        assert summary is not None
        dead = f"{summary.num_dead_experts} of {summary.num_experts}"
        overview.append([name, f"{summary.entropy:.3f}", f"{summary.max_share:.1%}", dead])
    header = [by.replace("_", " "), "load entropy (1 = balanced)", "largest share", "dead experts"]
    blocks = [_markdown(header, overview)]
    for name, table in panels.items():
        shares = {router: load_shares(counts) for router, counts in table.items()}
        blocks.append(
            f"Share of the choices of each router, {by.replace('_', ' ')} **{name}**:\n\n"
            + _expert_table(shares, {router: sum(counts) for router, counts in table.items()})
        )
    return "\n\n".join(blocks) + "\n"


def modality_report(load: ExpertLoad, *, adapter: str | None = None) -> str:
    """A markdown report of [`modality_shares`]: how far apart text and image are, and both inside each expert.

    Args:
        load (`ExpertLoad`): counts by token group.
        adapter (`str`, *optional*): only this adapter.

    Raises:
        ValueError: no router saw tokens of both kinds.

    Example:

    ```py
    >>> print(modality_report(load))
    ```
    """
    shares = modality_shares(load, adapter=adapter)
    labels = router_labels(list(shares))
    distances = [[label, f"{entry.distance:.3f}"] for label, entry in zip(labels, shares.values(), strict=True)]
    tables = {
        "Share of each expert, text and image weighing equally": {n: s.balanced for n, s in shares.items()},
        "Part of an expert's tokens that are image tokens, text and image weighing equally (50% = no preference)": {
            name: entry.image_fraction for name, entry in shares.items()
        },
        "Share of each expert among **text** tokens": {name: entry.text for name, entry in shares.items()},
        "Share of each expert among **image** tokens": {name: entry.image for name, entry in shares.items()},
    }
    header = ["router", "distance between text and image (0 = alike, 1 = no expert in common)"]
    blocks = [_markdown(header, distances)]
    blocks += [f"{caption}:\n\n{_expert_table(table)}" for caption, table in tables.items()]
    return "\n\n".join(blocks) + "\n"


def pathways_report(pathways: ExpertPathways, *, n: int = 10) -> str:
    """A markdown report: how concentrated pathways are, then the `n` most common ones of each token group.

    Args:
        pathways (`ExpertPathways`): the counts.
        n (`int`): how many pathways of each stack of layers and token group.

    Raises:
        ValueError: nothing was counted.

    Example:

    ```py
    >>> print(pathways_report(pathways))
    ```
    """
    if not pathways.stacks:
        raise ValueError("There are no pathways to report: no forward pass was counted.")
    overview, blocks = [], []
    for stack, key in pathways.stacks.items():
        for group in pathways.counts[key]:
            summary = pathways.summary(n, token_group=group, stack=stack)
            found = pathways.top(n, token_group=group, stack=stack)
            name = group if len(pathways.stacks) == 1 else f"{stack}, {group}"
            numbers = [str(summary["num_tokens"]), str(summary["num_pathways"])]
            shares = [f"{summary[share]:.1%}" for share in ("top_share", "independent_top_share")]
            overview.append([name, *numbers, *shares])
            rows = []
            for rank, pathway in enumerate(found, start=1):
                shares = [f"{share:.2%}" for share in (pathway.share, pathway.independent_share)]
                rows.append([str(rank), pathway.label, str(pathway.num_tokens), *shares, pathway.lift_label])
            layers = ", ".join(router_labels(key.routers))
            table = _markdown(["rank", "experts", "tokens", "share", "if layers were independent", "ratio"], rows)
            blocks.append(f"Pathways of **{group}** tokens through {stack} ({layers}):\n\n{table}")
    header = ["token group", "tokens", "distinct pathways", f"share of the top {n}", "if layers were independent"]
    return "\n\n".join([_markdown(header, overview), *blocks]) + "\n"


def _expert_table(table: Mapping[str, Sequence[float]], choices: Mapping[str, int] | None = None) -> str:
    """Router × expert in percent, and how many choices a router made where that is given."""
    width = max(map(len, table.values()))
    header = ["router", *(f"expert {index}" for index in range(width)), *(["choices"] if choices else [])]
    rows = []
    for label, (name, values) in zip(router_labels(list(table)), table.items(), strict=True):
        cells = ["–" if math.isnan(value) else f"{value:.1%}" for value in values]
        rows.append([label, *cells, *[""] * (width - len(cells)), *([str(choices[name])] if choices else [])])
    return _markdown(header, rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
