"""Tables of a result file of `mole_defaults.py`."""

from __future__ import annotations

import math
import statistics
from typing import Any


# two-sided 95% quantile of Student's t, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval; not a number with one value."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T95.get(len(values) - 1, 1.96) * spread


def runs_at(result: dict[str, Any], arm: str, which: str) -> dict[int, dict[str, Any]]:
    """Seed → run, at the learning rate chosen from the common grid (`"best_lr"`) or a finer one (`"finer_lr"`)."""
    lr = result[which].get(arm)
    return {run["seed"]: run for run in result["runs"] if run["arm"] == arm and run["lr"] == lr and "test" in run}


def macro(run: dict[str, Any]) -> float:
    """Test NLL, mean over domains."""
    return statistics.mean(run["test"].values())


def paired(result: dict[str, Any], arm: str, reference: str, which: str) -> tuple[float, float, int]:
    """Mean difference of the macro test NLL to another arm on the seeds that both have, its interval, and how many."""
    ours, theirs = runs_at(result, arm, which), runs_at(result, reference, which)
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [macro(ours[seed]) - macro(theirs[seed]) for seed in seeds]
    return (*mean_and_interval(differences), len(seeds))


def print_report(result: dict[str, Any]) -> None:
    """Everything as Markdown."""
    for which, title in (("best_lr", "All arms, common grid"), ("finer_lr", "Core arms, finer learning rates")):
        if result[which]:
            print(f"\n### {title}\n")
            _print_tables(result, which)


def _print_tables(result: dict[str, Any], which: str) -> None:
    domains = list(result["rows"]["test"])
    arms = [arm for arm in result["arms"] if runs_at(result, arm, which)]
    print(
        "| arm | parameters | active rank | lr | seeds | macro NLL | "
        + " | ".join(domains)
        + " | MI, bits | load, bits |"
    )
    print("|" + "---|" * (8 + len(domains)))
    base = result["base"]["test"]
    row = " | ".join(f"{base[domain]:.3f}" for domain in domains)
    print(f"| no adapter | 0 | 0 | | | {statistics.mean(base.values()):.3f} | {row} | | |")
    for arm in arms:
        about, runs = result["arms"][arm], runs_at(result, arm, which)
        total, interval = mean_and_interval([macro(run) for run in runs.values()])
        cells = [mean_and_interval([run["test"][domain] for run in runs.values()]) for domain in domains]
        print(
            f"| {arm} | {about['trainable_parameters']} | {about['active_rank']} | {result[which][arm]:g} | "
            f"{len(runs)} | {total:.3f} ± {interval:.3f} | "
            + " | ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in cells)
            + f" | {_routing(runs, 'mutual_information_bits')} | {_routing(runs, 'load_entropy_bits')} |"
        )
    references = [
        name for name in ("lora r4", "lora r8", "lora r16", "top-1 none", "top-1 st", "top-2 prob") if name in arms
    ]
    print("\nMacro test NLL minus that of the reference, paired by seed (negative: better than the reference)\n")
    print("| arm | " + " | ".join(references) + " |")
    print("|" + "---|" * (1 + len(references)))
    for arm in arms:
        cells = []
        for reference in references:
            mean, half, _ = paired(result, arm, reference, which)
            mark = "*" if abs(mean) > half else ""
            cells.append("" if arm == reference else f"{mean:+.3f} ± {half:.3f}{mark}")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def _routing(runs: dict[int, dict[str, Any]], key: str) -> str:
    values = [statistics.mean(run["routing"][key]) for run in runs.values() if "routing" in run]
    return f"{statistics.mean(values):.2f}" if values else ""
