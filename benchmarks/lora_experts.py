"""Times every way to compute LoRA experts, against the bare layer, PEFT's LoRA and a loop over experts.

    OMP_NUM_THREADS=1 python benchmarks/lora_experts.py --name cpu_fp32
    python benchmarks/lora_experts.py --device cuda --name cuda_lora_experts

One process, contenders interleaved round by round, median and interquartile range. On a CPU the clock is the CPU time
of the thread; on CUDA it is events on the device, with the L2 cache overwritten before each call, and what can be
captured is timed as a replayed graph as well. What computes the op is compared with `eager` in float64 before it is
timed, and has no time where it differs; the command then ends with status 1. `base_again` is a second copy of the bare
layer: how far its ratio is from 1 is the noise.

Shapes come in the order of importance. `benchmarks/results/<name>.json` is written after each of them, so that a run
that is cut off keeps its cells.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from contenders import WAITING, Contender, Problem, contenders, in_double, make_problem, ours, shape_arguments
from environment import command, hardware, state, versions
from public_kernels import PUBLIC
from report import print_report
from result_file import add_arguments, write
from roofline import floor, measure_ceilings
from shapes import CUDA, DEFAULT, FULL, QUICK, Shape
from timing import Clock, Run, calls_for, clock_of, drop_failing, interleaved, iqrs, medians, reason_of

from peft_moe.kernels import explain


LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MAX_ROUNDS = 50
NUM_COMPILED = 4


def step(problem: Problem, contender: Contender) -> list[torch.Tensor]:
    """Output and gradients; only the output for inference."""
    with contender.context():
        if problem.shape.is_inference:
            with torch.no_grad():
                return [contender.forward(problem.hidden_states)]
        out = contender.forward(problem.hidden_states)
        return [out.detach(), *torch.autograd.grad(out, contender.leaves, problem.grad_out)]


def steps(problem: Problem, entries: dict[str, Contender]) -> dict[str, Run]:
    """A call without arguments for each contender."""
    return {name: lambda contender=contender: step(problem, contender) for name, contender in entries.items()}


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative Frobenius error of output and gradients; not a number where one has any."""
    errors = [
        ((f.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
        for f, e in zip(found, expected, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def drop_wrong(
    problem: Problem, entries: dict[str, Contender], runs: dict[str, Run]
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of what computes the op, and those above the limit, whose runs are removed."""
    double = in_double(problem)
    expected = step(double, ours(double, "eager"))
    errors = {name: relative_error(runs[name](), expected) for name in runs if entries[name].is_the_op}
    wrong = {name: error for name, error in errors.items() if not error <= LIMIT[problem.dtype]}
    for name in wrong:
        del runs[name]
    return errors, wrong


def graphs(
    problem: Problem, runs: dict[str, Run], waiting: set[str], clock: Clock
) -> tuple[dict[str, Run], dict[str, str]]:
    """Replays of what can be captured, after a look whether a replay writes what a call returns; and reasons."""
    replays: dict[str, Run] = {}
    reasons = dict.fromkeys(sorted(waiting & set(runs)), "it waits for the device")
    for name, run in runs.items():
        if name in waiting:
            continue
        try:
            expected = run()
            replay, outputs = clock.captured(run)
            with torch.no_grad():
                for output in outputs:
                    output.fill_(float("nan"))
            replay()
            error = relative_error(outputs, expected)
            if not error <= LIMIT[problem.dtype]:
                raise ArithmeticError(f"a replay differs from a call by {error:.1e}")
            replays[name] = replay
        except (RuntimeError, NotImplementedError, ArithmeticError) as error:
            reasons[name] = reason_of(error)
            clock.synchronize()
    return replays, reasons


def measure(shape: Shape, dtype: torch.dtype, clock: Clock, options: argparse.Namespace, compiled: bool) -> dict:
    """One cell: correctness, then interleaved timings of calls, then of graphs, then memory."""
    problem = make_problem(shape, dtype, options.device)
    entries = contenders(problem, options.backends, options.compiler if compiled else None)
    not_run = {}
    for name, build in PUBLIC.items():
        try:
            entries[name] = Contender(build(problem), problem.leaves)
        except Exception as error:  # not installed, or another version of it
            not_run[name] = reason_of(error)
    auto = explain(**shape_arguments(shape), dtype=dtype, device=options.device).backend
    runs = steps(problem, entries)
    not_run |= drop_failing(runs, clock)
    errors, wrong = drop_wrong(problem, entries, runs)
    calls = {name: calls_for(run, clock) for name, run in runs.items()}
    times = interleaved(runs, clock, MAX_ROUNDS, calls, options.seconds)
    replays, not_captured = graphs(problem, runs, WAITING | ({"auto"} if auto in WAITING else set()), clock)
    replayed = interleaved(replays, clock, MAX_ROUNDS, calls, options.seconds) if replays else {}
    return {
        "shape": shape._asdict(),
        "kind": shape.kind,
        "auto": auto,
        "rounds": len(times["base"]),
        "errors": errors,
        "wrong": wrong,
        "not_run": not_run,
        "not_captured": not_captured,
        "floor": floor(shape, dtype.itemsize),
        "state": state(options.device),
        "median_ms": medians(times),
        "iqr_ms": iqrs(times),
        "graph_median_ms": medians(replayed),
        "graph_iqr_ms": iqrs(replayed),
        "peak_mib": {name: round(clock.peak_mib(run), 2) for name, run in runs.items()},
    }


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """What to measure."""
    if options.quick:
        found = QUICK
    elif options.device == "cuda":
        found = CUDA
    else:
        found = FULL if options.full else DEFAULT
    return [shape for shape in found if options.match in str(shape)]


def run_cells(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Add cell after cell to the result while there is time for one more, and write it each time."""
    started, longest = time.monotonic(), 0.0
    clock, dtype = clock_of(options.device), getattr(torch, options.dtype)
    result |= {"clock": clock.description, "state": state(options.device)}
    result["ceilings"] = measure_ceilings(clock, options.device, dtype, options.quick)
    shapes = shapes_of(options)
    for position, shape in enumerate(shapes):
        begun = time.monotonic()
        if begun - started + longest > options.total_seconds:
            result["not_reached"] = [str(left) for left in shapes[position:]]
            break
        result["cells"].append(measure(shape, dtype, clock, options, position < options.num_compiled))
        longest = max(longest, time.monotonic() - begun)
        result["seconds"] = round(time.monotonic() - started, 1)
        write(result, options)
        print(".", end="", flush=True, file=sys.stderr)
    write(result, options)


def parse() -> argparse.Namespace:
    """Options; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "cpu_fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--full", action="store_true", help="the larger grid (CPU)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether everything runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--seconds", type=float, help="per cell, after at least five rounds; default 3, on CUDA 2")
    parser.add_argument(
        "--total_seconds", type=float, default=float("inf"), help="no cell begins that would end later"
    )
    parser.add_argument("--match", default="", help="only shapes whose text contains this")
    parser.add_argument("--backends", nargs="*", help="only these backends (default: all that can run)")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile for PEFT's compiled LoRA")
    parser.add_argument("--num_compiled", type=int, help="for how many shapes; default 4 on CUDA, else 0")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    options.seconds = (2.0 if on_cuda else 3.0) if options.seconds is None else options.seconds
    if options.num_compiled is None:
        options.num_compiled = NUM_COMPILED if on_cuda else 0
    return options


def main() -> None:
    """Run the cells, write them, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "lora_experts",
        "command": command(),
        "dtype": options.dtype,
        "threads": options.threads,
        "hardware": hardware(options.device),
        "versions": versions(),
        "cells": [],
    }
    run_cells(result, options)
    print_report(result)
    wrong = [
        f"{name} at {Shape(**cell['shape'])} by {error:.1e}"
        for cell in result["cells"]
        for name, error in cell["wrong"].items()
        if name not in PUBLIC
    ]
    if wrong:
        sys.exit(f"Not timed, because these differ from eager: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
