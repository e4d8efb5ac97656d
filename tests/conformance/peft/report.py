"""The table of what PEFT's tests gave: one line per suite and configuration of ours, LoRA beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


CONTROL = "lora"
STATUSES = ("passed", "failed", "skipped", "xfailed")
# the name under which a test keeps (suite, key, case) among its properties
PROPERTY = "peft-tests"


@dataclass(frozen=True)
class Result:
    """What became of a test.

    Args:
        suite (`str`): which module of PEFT's tests.
        key (`str`): the test and the model: the same for each configuration.
        case (`str`): the configuration.
        status (`str`): one of `STATUSES`.
        reason (`str`): why it was expected to fail, if it was.
    """

    suite: str
    key: str
    case: str
    status: str
    reason: str = ""


def table(results: Iterable[Result]) -> list[str]:
    """The lines, the columns in the order of `STATUSES`."""
    results = list(results)
    of_control = {(result.suite, result.key): result.status for result in results if result.case == CONTROL}
    ours: dict[tuple[str, str], Counter[str]] = {}
    control: dict[tuple[str, str], Counter[str]] = {}
    for result in results:
        if result.case == CONTROL:
            continue
        line = result.suite, result.case
        ours.setdefault(line, Counter())[result.status] += 1
        control.setdefault(line, Counter())[of_control.get((result.suite, result.key), "not run")] += 1
    rows = [("suite", "configuration", " / ".join(STATUSES), "LoRA on the same")]
    rows += [(*line, _counts(ours[line]), _counts(control[line])) for line in ours]
    rows.append(("all", "", _counts(sum(ours.values(), Counter())), _counts(sum(control.values(), Counter()))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def failures_of_ours_alone(results: Iterable[Result]) -> list[str]:
    """What a configuration of ours fails and LoRA does not: each failure, and the expected ones counted by reason."""
    results = list(results)
    control_fails = {
        (result.suite, result.key)
        for result in results
        if result.case == CONTROL and result.status in ("failed", "xfailed")
    }
    alone = [
        result for result in results if result.case != CONTROL and (result.suite, result.key) not in control_fails
    ]
    failed = [result for result in alone if result.status == "failed"]
    expected = [result for result in alone if result.status == "xfailed"]
    return [
        f"Failures that the control lacks: {len(failed) or 'none'}",
        *(f"  {result.suite}: {result.key} with {result.case}" for result in failed),
        f"Expected failures that the control lacks: {len(expected) or 'none'}",
        *(f"  {n:4}  {reason}" for reason, n in Counter(result.reason for result in expected).most_common()),
    ]


def _counts(counter: Counter[str]) -> str:
    return " / ".join(str(counter[status]) for status in STATUSES)
