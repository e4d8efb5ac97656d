"""Clocks for the CPU and for CUDA, and the one way in which all benchmarks interleave what they compare.

A clock has `ms` (milliseconds per call), `peak_mib` (most memory of one call), `captured` (a call as a graph) and
`synchronize`. A benchmark gets one by `clock_of(device)` and is otherwise the same on every device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


Run = Callable[[], Any]

# larger than the last cache of any GPU, so that no call finds its inputs there
FLUSHED_BYTES = 2**28
WARM_UPS_BEFORE_CAPTURE = 3


class Clock(Protocol):
    """See the module."""

    description: str

    def ms(self, run: Run, calls: int) -> float:
        """Milliseconds per call, the mean of this many calls."""

    def peak_mib(self, run: Run) -> float:
        """The most memory that one call holds beyond what was there before it, in MiB."""

    def captured(self, run: Run) -> tuple[Run, Any]:
        """A function that replays `run` as one graph, and the outputs into which it writes."""

    def synchronize(self) -> None:
        """Wait for what was started; raises what went wrong meanwhile."""


class CpuClock:
    """CPU time of this thread, which other work on the machine does not count towards."""

    description = "time.thread_time"

    def ms(self, run: Run, calls: int) -> float:
        """See [`Clock`]."""
        total = 0.0
        for _ in range(calls):
            start = time.thread_time()
            run()
            total += time.thread_time() - start
        return total / calls * 1e3

    def peak_mib(self, run: Run) -> float:
        """As torch's profiler sees it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = run()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        del kept
        return peak / 2**20

    def captured(self, run: Run) -> tuple[Run, Any]:
        """There are no graphs to replay."""
        raise NotImplementedError("graphs are captured on CUDA only")

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaClock:
    """Time between two events on the device around each call. The L2 cache is overwritten before each.

    The host runs ahead while the cache is overwritten: launches cost time only where they are slower than the device.
    """

    description = "torch.cuda.Event around each call, L2 overwritten before it"

    def __init__(self, device: str = "cuda") -> None:
        self.flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def ms(self, run: Run, calls: int) -> float:
        """See [`Clock`]."""
        pairs = []
        for _ in range(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flushed.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.fmean(start.elapsed_time(end) for start, end in pairs)

    def peak_mib(self, run: Run) -> float:
        """As the caching allocator counts it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak / 2**20

    def captured(self, run: Run) -> tuple[Run, Any]:
        """See [`Clock`]; warmed up on a stream of its own, as capturing demands."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS_BEFORE_CAPTURE):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs

    def synchronize(self) -> None:
        """See [`Clock`]."""
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def drop_failing(runs: dict[str, Run], clock: Clock) -> dict[str, str]:
    """Call each once, as a warm-up too; remove what raises and return why. A broken device ends the program."""
    reasons = {}
    for name in list(runs):
        try:
            runs[name]()
            clock.synchronize()
        except Exception as error:  # a package of somebody else may raise anything
            reasons[name] = reason_of(error)
            del runs[name]
            clock.synchronize()
    return reasons


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def calls_for(run: Run, clock: Clock, at_least_ms: float = 5.0, at_most: int = 50) -> int:
    """How many calls fill so much time that the resolution of the clock does not matter."""
    return max(1, min(at_most, int(at_least_ms / max(clock.ms(run, 2), 1e-3))))


def interleaved(
    runs: dict[str, Run],
    clock: Clock,
    rounds: int,
    calls: dict[str, int] | None = None,
    seconds: float = float("inf"),
    at_least: int = 5,
) -> dict[str, list[float]]:
    """Milliseconds per call, one value per round, after a round that does not count.

    The order alternates, so that no contender always runs after the same one. Once `seconds` have passed no further
    round begins, if there were `at_least` so many.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for round_number in range(rounds + 1):
        for name in list(runs) if round_number % 2 else list(reversed(runs)):
            taken = clock.ms(runs[name], (calls or {}).get(name, 1))
            if round_number:
                times[name].append(taken)
        if round_number >= at_least and time.monotonic() - started > seconds:
            break
    return times


def iqr(values: list[float]) -> float:
    """Distance between the first and the third quartile; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of each contender."""
    return {name: statistics.median(values) for name, values in times.items()}


def iqrs(times: dict[str, list[float]]) -> dict[str, float]:
    """[`iqr`] of each contender."""
    return {name: iqr(values) for name, values in times.items()}
