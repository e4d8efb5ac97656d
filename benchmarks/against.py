"""This package against an earlier commit of it, in one run: step, decode and memory of whole models.

    git worktree add --detach /tmp/earlier COMMIT
    python benchmarks/against.py /tmp/earlier/src --name cpu_against_earlier
    python benchmarks/against.py /tmp/earlier/src --method mocle --name cpu_against_earlier_mocle

Two versions of one package do not fit into one process. So each has a process, which waits until it is told to run.
The two take turns, and the figure is the median of the ratios of neighbouring turns. The options and what is measured
are those of `whole_model.py`.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import whole_model
from environment import command, hardware, versions
from result_file import settings, write
from timing import clock_of


HERE = Path(__file__).resolve().parent


class Side:
    """One version of the package, in a process of its own."""

    def __init__(self, source: str, arguments: list[str]) -> None:
        self.environment = {**os.environ, "PYTHONPATH": source}
        self.arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> Any:
        """Send a line, wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def memory(self, contender: str) -> float:
        """MiB that a training step needs beyond the loaded model."""
        line = [sys.executable, str(HERE / "whole_model.py"), "--memory_of", contender, *self.arguments]
        found = subprocess.run(line, env=self.environment, check=True, capture_output=True, text=True).stdout
        return float(json.loads(found.split()[-1]))


def work(options: Any) -> None:
    """Say where the package comes from; then, for each line `cell contender`, run it once and answer milliseconds."""
    import peft_moe

    answers = sys.stdout
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    clock = clock_of(options.device)
    models = whole_model.build_all(options)
    runs = {
        (cell, name): make(model, options)
        for cell, make in (("step", whole_model.train_step), ("decode", whole_model.decode_run))
        for name, model in models.items()
    }
    for line in sys.stdin:
        answer: Any = peft_moe.__file__
        if line.strip() != "where":
            cell, name = line.split()
            answer = clock.ms(runs[cell, name], 1)
        print(json.dumps(answer), file=answers, flush=True)


def compare(new: Side, old: Side, options: Any) -> dict[str, dict[str, Any]]:
    """Ratios new / old, cell → contender → median and all values."""
    cells: dict[str, dict[str, Any]] = {}
    for cell in ("step", "decode"):
        values: dict[str, list[float]] = {name: [] for name in whole_model.METHODS[options.method]}
        for turn in range(options.rounds + 1):
            for name, ratios in values.items():
                first, second = (new, old) if turn % 2 else (old, new)
                found = {side: side.ask(f"{cell} {name}") for side in (first, second)}
                if turn:  # the first one warms up
                    ratios.append(found[new] / found[old])
        cells[cell] = values
    cells["memory"] = {name: [new.memory(name) / old.memory(name)] for name in whole_model.METHODS[options.method]}
    return {
        cell: {name: {"median": statistics.median(ratios), "ratios": ratios} for name, ratios in values.items()}
        for cell, values in cells.items()
    }


def main() -> None:
    """Start both sides, let them take turns, write and print."""
    if sys.argv[1] == "--worker":
        del sys.argv[1]
        work(whole_model.parse())
        return
    earlier = sys.argv.pop(1)
    options = whole_model.parse()
    own = str(HERE.parent / "src")
    new, old = (Side(source, sys.argv[1:]) for source in (own, earlier))
    for side, source in ((new, own), (old, earlier)):
        found = side.ask("where")
        assert Path(found).is_relative_to(Path(source).resolve()), f"{found} was imported, not {source}"
    result = {
        "benchmark": "against",
        "command": command(),
        "hardware": hardware(options.device),
        "versions": versions(),
        "settings": settings(options, "memory_of", "total_seconds"),
        "cells": compare(new, old, options),
    }
    write(result, options)
    for cell, contenders in result["cells"].items():
        print(f"{cell:<10}" + "".join(f"{name:>16} {found['median']:.3f}" for name, found in contenders.items()))


if __name__ == "__main__":
    main()
