"""The table of what the shared tests gave, per suite and model."""

from __future__ import annotations

from collections import Counter


MODELS = ("llava", "moe_llava")
SUITES = (
    "modeling",
    "configuration",
    "generation",
    "pipelines",
    "training",
    "tensor_parallel",
    "expert_parallel",
    "fsdp",
)
STATUSES = ("passed", "failed", "skipped")
# the name under which a test keeps (suite, model, status) among its properties
OUTCOME = "upstream-outcome"


def table(outcomes: Counter[tuple[str, str, str]]) -> list[str]:
    """Lines with passed / failed / skipped of every suite and model, from the number of (suite, model, status)."""
    suites = [suite for suite in SUITES if any(key[0] == suite for key in outcomes)]
    rows = [("suite", *MODELS)]
    for suite in suites:
        counts = [[outcomes[suite, model, status] for status in STATUSES] for model in MODELS]
        rows.append((suite, *(" / ".join(map(str, count)) for count in counts)))
    totals = [[sum(outcomes[suite, model, status] for suite in suites) for status in STATUSES] for model in MODELS]
    rows.append(("all", *(" / ".join(map(str, total)) for total in totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
