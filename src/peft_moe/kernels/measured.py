"""What is fastest here, as measured here: a file that `auto` asks before its rule. Off unless the environment names one.

With `PEFT_MOE_KERNEL_CACHE=<file.json>`, the first call of a shape class on a device times every backend that can run it,
on random tensors of that shape, and the file keeps the winner. Entries carry the versions of torch and of this package, so
that an update measures anew. Nothing is measured while a compiler traces, a CUDA graph is captured or a backward pass runs.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch._guards import detect_fake_mode

from .backend import Backend
from .case import Case
from .plan import DispatchPlan, per_token
from .registry import BACKENDS


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "PEFT_MOE_KERNEL_CACHE"
FORMAT = "peft_moe kernel cache 1"
ROUNDS = 5
# what is so much slower than the best in a first call is not timed again
HOPELESS = 10.0


class Finding(NamedTuple):
    """The fastest backend and the milliseconds of all that were timed; nothing where none could be."""

    backend: str
    ms: dict[str, float]

    def because(self) -> str:
        """The reason that `explain` and the log give."""
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.ms.items(), key=lambda item: item[1]))
        return f"measured here ({times}), kept in {CACHE_VARIABLE}"


_lock = threading.Lock()
_tables: dict[Path, dict[str, Finding]] = {}


def cache_file() -> Path | None:
    """The file that the environment names."""
    name = os.environ.get(CACHE_VARIABLE)
    return Path(name) if name else None


def look_up(file: Path, key: str) -> Finding | None:
    """What the file says; it is read once, and what cannot be read says nothing.

    Raises:
        `ValueError`: if the file is not such a cache.
    """
    table = _tables.get(file)
    if table is None:
        try:
            table = _read(file)
        except OSError as error:
            _warn_once(file, error.strerror or str(error))
            table = {}
        table = _tables.setdefault(file, table)
    return table.get(key)


def find(file: Path, key: str, case: Case, names: list[str]) -> Finding | None:
    """What the file says, after measuring where it says nothing; `None` where nothing can be measured now."""
    found = look_up(file, key)
    if found is not None or not can_measure(case):
        return found
    with _lock:
        found = look_up(file, key)
        if found is None:
            found = _in_clean_thread(case, names)
            stored = _store(file, key, found) if found.backend else {key: found}
            # what this process went by holds: the recomputation of a checkpoint takes the backend of its forward
            _tables[file] = {**stored, **_tables[file]}
            found = _tables[file][key]
    return found


def key_of(case: Case, shape_class: str) -> str:
    """Device, versions, whether there is a backward, and the shape class."""
    from .. import __version__

    if case.device == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    else:
        device = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    purpose = "training" if torch.is_grad_enabled() else "inference"
    return f"{device}; torch {torch.__version__}, peft_moe {__version__}; {purpose}; {shape_class}"


def can_measure(case: Case) -> bool:
    """Whether other work may be started in the middle of this call.

    Not inside of a backward pass: it holds the thread that the backward of a measurement would need.
    """
    if torch.compiler.is_compiling() or detect_fake_mode() is not None or torch._C._current_graph_task_id() != -1:
        return False
    if case.device == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return case.device == "cpu"


def _in_clean_thread(case: Case, names: list[str]) -> Finding:
    """Measure in a thread of its own: autocast, saved-tensor hooks (checkpointing) and modes of the caller stay out."""
    results: list[dict[str, float]] = []
    errors: list[BaseException] = []
    device = torch.device(case.device, torch.cuda.current_device()) if case.device == "cuda" else torch.device("cpu")
    trains = torch.is_grad_enabled()

    def work() -> None:
        try:
            # a thread starts with the first device, and Triton and streams go by the current one
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                results.append(measure(case, names, device, trains))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="peft_moe-measures-kernels")
    thread.start()
    thread.join()
    if errors and not isinstance(errors[0], RuntimeError):  # a RuntimeError is most often a lack of memory
        raise errors[0]
    ms = results[0] if results else {}
    return Finding(min(ms, key=ms.__getitem__) if ms else "", ms)


def measure(case: Case, names: list[str], device: torch.device, trains: bool) -> dict[str, float]:
    """Milliseconds of each backend that does not fail: forward, and backward too where gradients are on."""
    runs = calls(case, names, device, trains)
    first: dict[str, float] = {}
    for name, run in runs.items():
        try:
            run()  # compiles kernels
            first[name] = seconds_of(run, device)
        except RuntimeError as error:
            logger.info("kernel backend %s failed while it was measured: %s [%s]", name, error, case.describe())
    best = min(first.values(), default=0.0)
    times: dict[str, list[float]] = {name: [] for name, seconds in first.items() if seconds <= HOPELESS * best}
    for _ in range(ROUNDS):
        for name, taken in times.items():
            taken.append(seconds_of(runs[name], device))
    return {name: statistics.median(taken) * 1e3 for name, taken in times.items()}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def calls(case: Case, names: list[str], device: torch.device, trains: bool) -> dict[str, Callable[[], object]]:
    """A call of each backend, on the same random tensors; the random state of the caller is left alone."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_(trains)

    x, base_out = random(case.num_tokens, case.in_features), random(case.num_tokens, case.out_features)
    A = random(case.num_experts, case.rank, case.in_features)
    B = random(case.num_experts, case.rank, case.out_features)
    grad_out = torch.randn(base_out.shape, generator=generator, device=device).to(case.dtype)
    routing = (case.num_examples, case.top_k)
    index = torch.randint(case.num_experts, routing, generator=generator, device=device)
    weights = random(*routing, dtype=torch.promote_types(case.dtype, torch.float32))

    def call(backend: Backend) -> object:
        plan = DispatchPlan.from_index(index, case.num_experts, tokens_per_example=case.tokens_per_example)
        with torch.set_grad_enabled(trains):
            given = weights if backend.takes_examples else per_token(weights, case.tokens_per_example)
            out = backend.run(x, base_out, A, B, given, plan, 1.0, False)
            return torch.autograd.grad(out, [x, A, B, weights], grad_out) if trains else out

    return {name: partial(call, BACKENDS[name]) for name in names}


def _read(file: Path) -> dict[str, Finding]:
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        return {key: _finding(key, entry) for key, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CACHE_VARIABLE} names {str(file)!r}, which is no cache of kernel measurements: {error}. Name another file, "
            "or delete this one to measure anew."
        ) from error


def _finding(key: str, entry: Any) -> Finding:
    backend, ms = entry["backend"], entry["ms"]
    if isinstance(backend, str) and isinstance(ms, dict) and all(isinstance(t, int | float) for t in ms.values()):
        return Finding(backend, ms)
    raise ValueError(f"its entry {key!r} is {entry!r}, not the name of a backend and its times in milliseconds")


def _store(file: Path, key: str, finding: Finding) -> dict[str, Finding]:
    """What other processes wrote meanwhile, and this entry where none of them wrote it; both go into the file."""
    entries = {key: finding}
    try:
        written = _read(file)
        entries |= written
        if key not in written:
            _write(file, entries)
    except OSError as error:
        _warn_once(file, error.strerror or str(error))
    return entries


def _write(file: Path, entries: dict[str, Finding]) -> None:
    """Put the file in place in one step, with the permissions of any new file."""
    content = {"format": FORMAT, "entries": {name: entry._asdict() for name, entry in sorted(entries.items())}}
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        staged.write_text(json.dumps(content, indent=1))
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)


@cache
def _warn_once(file: Path, problem: str) -> None:
    logger.warning(
        "%s names %r, which cannot be read or written: %s. What is measured is kept in this process only; to keep it for "
        "others, name another file.",
        CACHE_VARIABLE,
        str(file),
        problem,
    )
