"""What a module of stacked experts is made of, in the terms of transformers' experts interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize


Activation = Callable[[torch.Tensor], torch.Tensor]


class Linears(NamedTuple):
    """The stacked linears of E experts, `x W_up → activation → W_down`.

    `up` `(E, D, U)` and `down` `(E, F, D)`, seen as matrices that rows are multiplied with from the left; U is 2F where
    there is a gate. Biases `(E, U)` and `(E, D)`, or `None`.
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class Order(NamedTuple):
    """The pairs of token and expert, sorted by expert.

    Args:
        index_TK (`torch.Tensor` of shape `(T, K)`, int64): the experts of each token.
        pair_of_row (`torch.Tensor` of shape `(N,)`, int32): row → t·K + k.
        segment_end (`torch.Tensor` of shape `(E,)` or `(E + 1,)`, int32):
            Where the rows of each expert end; experts of other processes are a further one.
    """

    index_TK: torch.Tensor
    pair_of_row: torch.Tensor
    segment_end: torch.Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.index_TK.shape[1]

    @property
    def num_pairs(self) -> int:
        """N = T·K."""
        return self.index_TK.numel()

    def has_sentinel(self, num_experts: int) -> bool:
        """Whether pairs may name an expert of another process."""
        return self.segment_end.shape[0] > num_experts


class Wanted(NamedTuple):
    """What backward needs from between the linears: `du` `(N, U)` and `w h` `(N, F)` by row, `h · g` `(N,)` by pair."""

    grad_inner: bool
    weighted: bool
    dots: bool


def obstacle(experts: nn.Module) -> str | None:
    """Why these experts are more than two linears with an activation between them, if they are."""
    if getattr(experts, "has_post_expert_norm", False):
        return "the experts have a norm after their second linear"
    up, down = weight_names(experts)
    named = dict(experts.named_parameters())
    others = sorted(set(named) - {up, down, f"{up}_bias", f"{down}_bias"} - _parametrized(named))
    if others:
        return f"the experts have parameters beside their two linears ({', '.join(others)})"
    for name in (up, down):
        weight = stored(experts, name)
        if isinstance(weight, DTensor) or not weight.is_floating_point():
            return f"{name!r} is {type(weight).__name__} of {weight.dtype}"
    return None


def has_sentinel(experts: nn.Module) -> bool:
    """Whether E may stand for an expert of another process."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def stored(experts: nn.Module, name: str) -> torch.Tensor:
    """What is behind an attribute: to read a parametrized one would compute it."""
    parameter = experts._parameters.get(name)
    if parameter is None and parametrize.is_parametrized(experts, name):
        parameter = experts.get_parameter(f"parametrizations.{name}.original")
    found: torch.Tensor = getattr(experts, name) if parameter is None else parameter
    return found


def _parametrized(names: Any) -> set[str]:
    """What `torch.nn.utils.parametrize` (PEFT's `target_parameters`) keeps behind an attribute."""
    return {name for name in names if name.startswith("parametrizations.")}


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """The attributes with the weights of both linears."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def activation_of(experts: nn.Module) -> Activation:
    """What is between the linears: `(N, U)` → `(N, F)`."""
    return experts._apply_gate if experts.has_gate else experts.act_fn  # type: ignore[return-value]


def linears_of(experts: nn.Module, device: torch.device) -> tuple[Linears, torch.dtype]:
    """The linears as they are, and the dtype to compute in."""
    parts: dict[str, torch.Tensor | None] = {}
    for name, weight_name in zip(("up", "down"), weight_names(experts), strict=True):
        weight = getattr(experts, weight_name)
        parts[name] = weight if experts.is_transposed else weight.transpose(1, 2)
        parts[f"{name}_bias"] = getattr(experts, f"{weight_name}_bias") if experts.has_bias else None
    linears = Linears(**parts)  # type: ignore[arg-type]
    return linears, dtype_of(linears.up, linears.down, device)


def dtype_of(up: torch.Tensor, down: torch.Tensor, device: torch.device) -> torch.dtype:
    """The wider dtype of both weights, or that of autocast."""
    dtype = torch.promote_types(up.dtype, down.dtype)
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    return dtype


def second_derivative_error(name: str) -> RuntimeError:
    """What is raised where a gradient of a gradient is asked for."""
    return RuntimeError(
        f"{name!r} experts have no second derivative, which create_graph=True asks for. Use "
        "model.set_experts_implementation('grouped_mm')."
    )
