"""Every way to compute the op, one file each, and the choice between them.

A file in this folder exposes `BACKEND` and is then found, tested and offered without being listed anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ..call import Call


logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PEFT_MOE_KERNEL_BACKEND"


class Case(NamedTuple):
    """One call of [`lora_experts`], without its tensors: what decides who can run it, and who runs it fastest.

    `top_k` is 0 for ordinary LoRA, where there is one expert and nothing to dispatch (`plan=None`).
    `tokens_per_example` is above 1 where whole examples are routed.
    """

    num_tokens: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int
    top_k: int
    dtype: torch.dtype
    device: str
    tokens_per_example: int = 1

    @property
    def num_examples(self) -> int:
        """How many rows the plan has."""
        return self.num_tokens // self.tokens_per_example

    @property
    def is_dispatched(self) -> bool:
        """Whether tokens go to different experts; false for ordinary LoRA."""
        return self.top_k > 0

    @property
    def num_pairs(self) -> int:
        """(token, slot) pairs."""
        return self.num_tokens * max(self.top_k, 1)

    @property
    def relative_rank(self) -> float:
        """E·R over the smaller of in and out features: how dear `dense` is against the base layer."""
        return self.num_experts * self.rank / max(1, min(self.in_features, self.out_features))

    def describe(self) -> str:
        """The case in one line, for logs and errors."""
        route = f"top_k={self.top_k}" if self.is_dispatched else "no dispatch"
        if self.tokens_per_example > 1:
            route += f" per {self.tokens_per_example} tokens"
        return (
            f"tokens={self.num_tokens}, in={self.in_features}, out={self.out_features}, experts={self.num_experts}, "
            f"rank={self.rank}, {route}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        )


def always_usable() -> tuple[bool, str]:
    """For backends that need nothing but torch."""
    return True, "needs only torch"


def supports_everything(case: Case) -> tuple[bool, str]:
    """For backends without limits on shape, dtype or device."""
    return True, "no limits"


@dataclass(frozen=True)
class Backend:
    """One way to compute the op.

    Args:
        name (`str`):
            What users write as `backend=...`; equal to the name of the file.
        summary (`str`):
            One line for reports.
        run (`Callable[[Call], torch.Tensor]`):
            The function: `out` of the shape of the call's `base`. Must be differentiable where its inputs require
            gradients.
        is_usable (`Callable[[], tuple[bool, str]]`):
            Whether this environment can run it at all, and why (not).
        supports (`Callable[[Case], tuple[bool, str]]`):
            Whether it can run this shape, dtype and device, and why (not).
        traces_fullgraph (`bool`):
            Whether `torch.compile(fullgraph=True)` can trace it.
        needs_plan (`bool`):
            Whether ordinary LoRA reaches it with a plan that sends every token to expert 0; `False` to get `None`.
        takes_examples (`bool`):
            Whether weights of a plan that routes whole examples reach it as `(B, K)`; `False` to get `(T, K)`.
    """

    name: str
    summary: str
    run: Callable[[Call], torch.Tensor]
    is_usable: Callable[[], tuple[bool, str]] = always_usable
    supports: Callable[[Case], tuple[bool, str]] = supports_everything
    traces_fullgraph: bool = False
    needs_plan: bool = True
    takes_examples: bool = False

    def refusal(self, case: Case) -> str | None:
        """Why it cannot run `case` here, if it cannot."""
        for can_run, reason in (self.is_usable(), self.supports(case)):
            if not can_run:
                return reason
        return None


class Row(NamedTuple):
    """A line of the rule behind `auto`: what to run where `fits` holds, and why, as `explain` and the log say it."""

    backend: str
    fits: Callable[[Case], bool]
    because: str


# The first row that fits and can run decides. Rows for the CPU follow benchmarks/results/cpu_fp32.json
# (benchmarks/studies/log.md); those for CUDA follow from a model of operations and bytes, and say so.
RULE = (
    Row("plain", lambda c: not c.is_dispatched, "there is one expert and nothing to dispatch"),
    Row("gather", lambda c: c.tokens_per_example > 1, "whole examples are routed: one batched product, no sort"),
    Row(
        "pair_loop",
        lambda c: c.device == "cpu" and c.num_pairs <= 8,
        "a handful of pairs: nothing is cheaper than to use the experts in place",
    ),
    Row(
        "dense",
        lambda c: c.device == "cpu" and c.top_k >= 2 and c.relative_rank <= 0.1,
        "several slots and few columns: cheaper than sorting",
    ),
    Row(
        "dense",
        lambda c: c.device == "cpu" and c.num_pairs > 512 and c.relative_rank <= 0.06,
        "very few columns: cheaper than sorting",
    ),
    Row("grouped_mm", lambda c: c.device == "cpu", "tokens are sorted by expert"),
    Row("gather", lambda c: c.num_pairs <= 8, "a handful of pairs: copying the experts needs no sort (not measured)"),
    Row(
        "dense",
        lambda c: c.device == "cuda" and c.relative_rank <= 0.0625,
        "few columns against a GPU's FLOPs per byte (not measured)",
    ),
    Row("grouped_mm", lambda c: c.device == "cuda", "many columns on a GPU (not measured)"),
    Row("dense", lambda c: True, "runs everywhere"),
)
# under a compiler the choice is between backends that trace whole
COMPILED_RULE = (*RULE[:2], Row("dense", lambda c: True, "traces whole under torch.compile"))


class Choice(NamedTuple):
    """The backend of a case and the reason for it. `str(choice)` is one readable line."""

    backend: str
    because: str
    case: Case

    def __str__(self) -> str:
        return f"{self.backend}: {self.because} [{self.case.describe()}]"


def validate_name(name: str) -> None:
    """Raise `ValueError` unless `name` is `"auto"` or a registered backend."""
    if name != "auto" and name not in BACKENDS:
        close = difflib.get_close_matches(name, ["auto", *BACKENDS], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no kernel backend {name!r}.{hint} Pass 'auto' or one of {sorted(BACKENDS)}.")


def forced_backend() -> str:
    """The value of the environment variable that replaces `auto`, or the empty string."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def decide(requested: str, forced: str, case: Case, *, is_compiling: bool = False) -> Choice:
    """A name beats the environment variable, which beats the rule; what was named never gives way to another.

    Raises:
        `ValueError`: if there is no backend of that name.
        `RuntimeError`: if a named backend cannot run here or cannot run this case; says which and why.
    """
    name, asked_by = requested, f"backend={requested!r}"
    if requested == "auto" and forced not in ("", "auto"):
        name, asked_by = forced, f"the environment variable {ENVIRONMENT_VARIABLE}={forced}"
    if name == "auto":
        for row in COMPILED_RULE if is_compiling else RULE:
            if row.fits(case) and BACKENDS[row.backend].refusal(case) is None:
                return Choice(row.backend, row.because, case)
    validate_name(name)
    reason = BACKENDS[name].refusal(case)
    if reason is not None:
        runnable = [other for other, backend in BACKENDS.items() if backend.refusal(case) is None]
        raise RuntimeError(
            f"Kernel backend {name!r}, asked for by {asked_by}, cannot run this case: {reason}. "
            f"The case is {case.describe()}. Use backend='auto', or one of {runnable}."
        )
    return Choice(name, f"asked for by {asked_by}", case)


def backend_for(requested: str, case: Case) -> Backend:
    """The backend of a call; without cache and log where a compiler traces, as it would trace those too."""
    if torch.compiler.is_compiling():
        return BACKENDS[decide(requested, forced_backend(), case, is_compiling=True).backend]
    return choose(requested, forced_backend(), case)


@lru_cache(maxsize=4096)
def choose(requested: str, forced: str, case: Case) -> Backend:
    """The backend for `case`; `forced` is the value of the environment variable. Logs `auto` once per shape class."""
    choice = decide(requested, forced, case)
    if requested == "auto":
        log_once(choice.backend, choice.because, shape_class(case))
    return BACKENDS[choice.backend]


def shape_class(case: Case) -> str:
    """The case with its number of tokens rounded up to a power of two."""
    tokens = 0 if case.num_tokens == 0 else 1 << (case.num_tokens - 1).bit_length()
    per_example = 1 if case.tokens_per_example == 1 else tokens
    rounded = case._replace(num_tokens=tokens, tokens_per_example=per_example)
    return rounded.describe().replace("tokens=", "tokens<=", 1)


@cache
def log_once(backend: str, because: str, described: str) -> None:
    """Log a choice of `auto`, the first time that it is made."""
    logger.info("kernel backend auto -> %s: %s [%s]", backend, because, described)


def explain(
    *,
    num_tokens: int,
    in_features: int,
    out_features: int,
    num_experts: int,
    rank: int,
    top_k: int,
    tokens_per_example: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> Choice:
    """Say which backend a call would run, and why, without running it.

    Args:
        num_tokens (`int`):
            Tokens after flattening (T).
        in_features, out_features, num_experts, rank (`int`):
            D, O, E, R.
        top_k (`int`):
            Experts per token (K); 0 for ordinary LoRA without a plan.
        tokens_per_example (`int`):
            Consecutive tokens that are routed as one (MoCLE routes whole examples).
        dtype (`torch.dtype`):
            Compute dtype.
        device (`str` or `torch.device`):
            Where the tensors live.
        backend (`str`):
            As for [`lora_experts`].

    Raises:
        `ValueError`: if there is no such backend.
        `RuntimeError`: if a named backend cannot run the case.

    >>> from peft_moe.kernels import explain
    >>> explain(num_tokens=64, in_features=32, out_features=32, num_experts=1, rank=4, top_k=0).backend
    'plain'
    """
    sizes = (num_tokens, in_features, out_features, num_experts, rank, top_k)
    return decide(backend, forced_backend(), Case(*sizes, dtype, torch.device(device).type, tokens_per_example))


def backend_report() -> list[tuple[str, bool, str]]:
    """Every backend as `(name, whether this environment can run it, why or why not)`.

    >>> from peft_moe.kernels import backend_report
    >>> "eager" in {name for name, is_usable, _ in backend_report() if is_usable}
    True
    """
    return [(name, *backend.is_usable()) for name, backend in BACKENDS.items()]


def discover(package: str, path: list[str]) -> dict[str, Backend]:
    """Import every module of a package that lies at `path` and collect its `BACKEND`, by name.

    Raises:
        `ImportError`: if a module has no `BACKEND`, or one that is not called like its file.
    """
    found = {}
    for module_name in sorted(info.name for info in pkgutil.iter_modules(path)):
        module = importlib.import_module(f"{package}.{module_name}")
        backend = getattr(module, "BACKEND", None)
        if not isinstance(backend, Backend) or backend.name != module_name:
            raise ImportError(
                f"{module.__name__} must define BACKEND = Backend(name={module_name!r}, ...), but BACKEND is "
                f"{backend!r}. Name it after its file, or move the file out of {package}."
            )
        found[backend.name] = backend
    return found


# last, because the files import the names above
BACKENDS: dict[str, Backend] = discover(__name__, list(__path__))
