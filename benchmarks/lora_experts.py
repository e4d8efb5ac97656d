"""Times every way to compute LoRA experts, against the bare layer, PEFT's LoRA and a loop over experts.

    OMP_NUM_THREADS=1 python benchmarks/lora_experts.py --name cpu_fp32

One process, contenders interleaved round by round, CPU time of the thread, median and interquartile range. Each backend
is compared with `eager` before any time is printed. Writes `benchmarks/results/<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contenders import Forward, Problem, contenders, make_problem, ours
from report import print_report
from shapes import DEFAULT, FULL, Shape

from peft_moe.kernels import BACKENDS, explain


RESULTS = Path(__file__).parent / "results"
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def step(problem: Problem, forward: Forward) -> None:
    """Forward and backward with gradients for x, A, B and weights; for one token only forward, as in decoding."""
    if problem.shape.kind == "decode":
        with torch.no_grad():
            forward(problem.hidden_states)
        return
    forward(problem.hidden_states).backward(problem.grad_out)


def clear_gradients(problem: Problem, forward: Forward) -> None:
    """Forget gradients, outside of the timed part."""
    problem.hidden_states.grad = problem.A.grad = problem.B.grad = problem.top_k_weights.grad = None
    if isinstance(forward, torch.nn.Module):
        forward.zero_grad(set_to_none=True)


def repetitions(seconds: float) -> int:
    """Calls per timing: enough to make the clock's resolution irrelevant."""
    return max(1, min(50, int(0.005 / max(seconds, 1e-6))))


def timed(problem: Problem, forward: Forward, calls: int) -> float:
    """Milliseconds of thread CPU time per step."""
    total = 0.0
    for _ in range(calls):
        clear_gradients(problem, forward)
        start = time.thread_time()
        step(problem, forward)
        total += time.thread_time() - start
    return total / calls * 1e3


def check(problem: Problem, names: list[str]) -> dict[str, float]:
    """Largest relative Frobenius error of output and gradients against `eager`; raises above the limit."""
    leaves = (problem.hidden_states, problem.A, problem.B, problem.top_k_weights)

    def run(name: str) -> list[torch.Tensor]:
        out = ours(problem, name)(problem.hidden_states)
        return [out.detach(), *torch.autograd.grad(out, leaves, problem.grad_out)]

    expected, errors = run("eager"), {}
    for name in names:
        found = run(name)
        errors[name] = max(float((f - e).norm() / e.norm().clamp_min(1e-30)) for f, e in zip(found, expected))
        if errors[name] > LIMIT[problem.dtype]:
            sys.exit(f"{name} differs from eager by {errors[name]:.1e} at {problem.shape}: no time is worth printing.")
    return errors


def measure(shape: Shape, dtype: torch.dtype, budget_s: float, only: list[str] | None) -> dict[str, Any]:
    """One cell: correctness, then interleaved timings."""
    problem = make_problem(shape, dtype)
    entries = contenders(problem, only)
    errors = check(problem, [name for name in entries if name in BACKENDS or name == "auto"])
    times: dict[str, list[float]] = {name: [] for name in entries}
    calls = {name: repetitions(timed(problem, forward, 2) / 1e3) for name, forward in entries.items()}
    started = time.monotonic()
    # the order alternates, so that no contender always runs after the same one
    for round_number in range(50):
        names = list(entries) if round_number % 2 else list(reversed(entries))
        for name in names:
            times[name].append(timed(problem, entries[name], calls[name]))
        if round_number >= 4 and time.monotonic() - started > budget_s:
            break
    arguments = {name: value for name, value in shape._asdict().items() if name != "routing"}
    return {
        "shape": shape._asdict(),
        "kind": shape.kind,
        "auto": explain(**arguments, dtype=dtype).backend,
        "rounds": len(times["base"]),
        "errors": errors,
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "peak_mib": {name: round(peak_mib(problem, entries[name]), 2) for name in ("base", "peft_r", "auto")},
        "iqr_ms": {name: iqr(values) for name, values in times.items()},
    }


def peak_mib(problem: Problem, forward: Forward) -> float:
    """Most memory that one step holds beyond what was there before it, in MiB."""
    clear_gradients(problem, forward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(problem, forward)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def iqr(values: list[float]) -> float:
    """Distance between the first and the third quartile."""
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def hardware() -> dict[str, str]:
    """Model of the processor, without the name of the machine."""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"device": "cpu", "processor": models[0] if models else platform.processor(), "cores": str(len(models))}


def versions() -> dict[str, str]:
    """Of everything that has a part in the times."""
    import peft

    return {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}


def main() -> None:
    """Run the cells, write them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu_fp32", help="name of the result file")
    parser.add_argument("--full", action="store_true", help="the larger grid")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per cell, after at least five rounds")
    parser.add_argument("--match", default="", help="only shapes whose text contains this")
    parser.add_argument("--backends", nargs="*", help="only these backends (default: all that can run)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    cells = []
    for shape in FULL if arguments.full else DEFAULT:
        if arguments.match in str(shape):
            cells.append(measure(shape, dtype, arguments.seconds, arguments.backends))
            print(".", end="", flush=True, file=sys.stderr)
    result = {
        "benchmark": "lora_experts",
        "command": "python benchmarks/lora_experts.py " + " ".join(sys.argv[1:]),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "clock": "time.thread_time",
        "hardware": hardware(),
        "versions": versions(),
        "cells": cells,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_report(result)


if __name__ == "__main__":
    main()
