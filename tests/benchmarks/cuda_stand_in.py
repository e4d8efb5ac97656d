"""Stands in for the parts of `torch.cuda` that the benchmarks use, on a machine without a GPU: nothing here measures.

It is as strict as the real one where a mistake would only be seen on a device: an event has a time once it was
recorded and waited for, and a replay repeats the operations that were captured, into the same tensors.
"""

from __future__ import annotations

import contextlib
import time

import timing
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    """Has a time after `record` and a wait for the device."""

    unfinished: list[Event] = []

    def __init__(self, enable_timing=False):
        assert enable_timing, "an event without timing has no time"
        self.recorded_at, self.is_done = None, False

    def record(self):
        self.recorded_at = time.perf_counter()
        Event.unfinished.append(self)

    def elapsed_time(self, end):
        assert self.is_done and end.is_done, "the device may not be there yet: synchronize first"
        return max((end.recorded_at - self.recorded_at) * 1e3, 1e-3)


class CUDAGraph(TorchDispatchMode):
    """Notes every operation while it is captured."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        """Repeat them, each into the tensors that it made."""
        assert self.operations, "nothing was captured"
        for operation, args, kwargs, result in self.operations:
            for kept, fresh in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and storage(kept) != storage(fresh):
                    kept.copy_(fresh)


def storage(tensor):
    """Where the numbers of a tensor are."""
    return tensor.untyped_storage().data_ptr()


class Stream:
    """Counts nothing, but has to be waited for on both sides of a warm-up."""

    def wait_stream(self, other):
        assert isinstance(other, Stream)


def install(monkeypatch):
    """Replace the names in `torch.cuda`; there is no cache on a device to overwrite either."""
    monkeypatch.setattr(timing, "FLUSHED_BYTES", 1024)

    def synchronize(*_):
        for event in Event.unfinished:
            event.is_done = True
        Event.unfinished.clear()

    current = Stream()
    for name, value in {
        "Event": Event,
        "graph": lambda captured: captured,  # a mode, and so a context
        "CUDAGraph": CUDAGraph,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *_: current,
        "synchronize": synchronize,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 2**20,
        "max_memory_allocated": lambda *_: 3 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
