"""Chooses the backend of a call: the one that was named, the one that the environment names, or by measurement or rule."""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from . import measured
from .auto_rule import COMPILED_RULE, RULE
from .backend import Backend, unknown_backend_message
from .case import Case
from .registry import BACKENDS


logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PEFT_MOE_KERNEL_BACKEND"


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
        raise ValueError(unknown_backend_message(name, BACKENDS))


def named(name: str, case: Case, *, asked_by: str) -> Choice:
    """The backend called `name`, which never gives way to another one.

    Raises:
        `ValueError`: if there is no such backend.
        `RuntimeError`: if it cannot run here or cannot run this case; says which and why.
    """
    validate_name(name)
    for can_run, reason in (BACKENDS[name].is_usable(), BACKENDS[name].supports(case)):
        if not can_run:
            raise RuntimeError(
                f"Kernel backend {name!r}, asked for by {asked_by}, cannot run this case: {reason}. "
                f"The case is {case.describe()}. Use backend='auto', or one of {runnable(case)}."
            )
    return Choice(name, f"asked for by {asked_by}", case)


def runnable(case: Case) -> list[str]:
    """Names of the backends that can run `case` here."""
    return [name for name, backend in BACKENDS.items() if backend.is_usable()[0] and backend.supports(case)[0]]


def by_rule(case: Case, *, is_compiling: bool = False) -> Choice:
    """The first row of the rule that fits and can run."""
    for row in COMPILED_RULE if is_compiling else RULE:
        backend = BACKENDS[row.backend]
        if row.fits(case) and backend.is_usable()[0] and backend.supports(case)[0]:
            return Choice(row.backend, row.because, case)
    return Choice("eager", "no row of the rule fits", case)


def measured_choice(case: Case, forced: str, *, may_measure: bool) -> Choice | None:
    """What the file of measurements says, where the environment names one and nothing else decides.

    `may_measure` fills a gap in the file where that is possible.
    """
    file = measured.cache_file()
    if file is None or forced not in ("", "auto") or not case.is_dispatched or case.num_tokens == 0:
        return None
    key = measured.key_of(case, shape_class(case))
    able = runnable(case)
    # the definition of the op is no candidate, unless nothing else runs
    candidates = [name for name in able if name != "eager"] or able
    found = measured.find(file, key, case, candidates) if may_measure else measured.look_up(file, key)
    return Choice(found.backend, found.because(), case) if found is not None and found.backend in able else None


def backend_of(requested: str, case: Case) -> Backend:
    """The backend of a call that no compiler traces. Logs the choice of `auto` once per shape class."""
    forced = forced_backend()
    if requested == "auto" and (choice := measured_choice(case, forced, may_measure=True)) is not None:
        log_once(choice.backend, choice.because, shape_class(case))
        return BACKENDS[choice.backend]
    return choose(requested, forced, case)


@lru_cache(maxsize=4096)
def choose(requested: str, forced: str, case: Case) -> Backend:
    """The backend for `case`; `forced` is the value of the environment variable. Logs once per shape class."""
    choice = decide(requested, forced, case)
    if requested == "auto":
        log_once(choice.backend, choice.because, shape_class(case))
    return BACKENDS[choice.backend]


def decide(requested: str, forced: str, case: Case, *, is_compiling: bool = False) -> Choice:
    """A name beats the environment variable, which beats the rule."""
    if requested != "auto":
        return named(requested, case, asked_by=f"backend={requested!r}")
    if forced not in ("", "auto"):
        return named(forced, case, asked_by=f"the environment variable {ENVIRONMENT_VARIABLE}={forced}")
    return by_rule(case, is_compiling=is_compiling)


@lru_cache(maxsize=4096)
def shape_class(case: Case) -> str:
    """The case with its number of tokens rounded up to a power of two."""
    tokens = 0 if case.num_tokens == 0 else 1 << (case.num_tokens - 1).bit_length()
    per_example = 1 if case.tokens_per_example == 1 else tokens
    return (
        case._replace(num_tokens=tokens, tokens_per_example=per_example).describe().replace("tokens=", "tokens<=", 1)
    )


@cache
def log_once(backend: str, because: str, described: str) -> None:
    """Log a choice of `auto`, the first time that it is made."""
    logger.info("kernel backend auto -> %s: %s [%s]", backend, because, described)


def forced_backend() -> str:
    """The value of the environment variable that replaces `auto`, or the empty string."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


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
    device_type = torch.device(device).type
    case = Case(
        num_tokens, in_features, out_features, num_experts, rank, top_k, dtype, device_type, tokens_per_example
    )
    forced = forced_backend()
    found = measured_choice(case, forced, may_measure=False) if backend == "auto" else None
    return found or decide(backend, forced, case)
