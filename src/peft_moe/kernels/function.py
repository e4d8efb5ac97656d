"""Gives a hand-written forward and backward to autograd. Shared by all backends that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .backend import Run
from .plan import DispatchPlan


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden_states: bool
    A: bool
    B: bool
    top_k_weights: bool


# (hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace) -> (out, projected); `projected` is A·x in the
# backend's own layout, unweighted and unscaled
Forward = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]
# (grad_out, hidden_states, A, B, top_k_weights, projected, plan, scaling, needs) -> gradients in the order of `Needs`
Backward = Callable[..., "tuple[torch.Tensor | None, ...]"]


class _LoraExperts(torch.autograd.Function):
    """`base_out + scaling · Σ_k w_tk B_e A_e x_t` with the derivative left to the backend."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        base_out: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        top_k_weights: torch.Tensor | None,
        plan: DispatchPlan | None,
        scaling: float,
        inplace: bool,
        kernel: tuple[Forward, Backward],
    ) -> torch.Tensor:
        out, projected = flattened(kernel[0], hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)
        x, _, a, b, w = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            hidden_states if a else None,
            A,
            B,
            top_k_weights,
            projected if b or w else None,
        )
        ctx.plan, ctx.scaling, ctx.backward_kernel = plan, scaling, kernel[1]
        ctx.hidden_states_shape = hidden_states.shape
        if inplace:
            ctx.mark_dirty(base_out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        grads: tuple[torch.Tensor | None, ...] = (None, None, None, None)
        if any(needs):
            hidden_states, A, B, weights, projected = ctx.saved_tensors
            arguments = (
                rows_of(grad_out).contiguous(),
                None if hidden_states is None else rows_of(hidden_states),
                A,
                B,
                weights,
                projected,
                ctx.plan,
                ctx.scaling,
                needs,
            )
            if torch.is_autocast_enabled(grad_out.device.type):
                with torch.autocast(grad_out.device.type, enabled=False):
                    grads = ctx.backward_kernel(*arguments)
            else:
                grads = ctx.backward_kernel(*arguments)
        grad_hidden_states = None if grads[0] is None else grads[0].view(ctx.hidden_states_shape)
        return (grad_hidden_states, grad_base, *grads[1:], None, None, None, None)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., W)` → `(T, W)`, a view where that is possible."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def flattened(
    forward: Forward, hidden_states: torch.Tensor, base_out: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `forward` on rows and give its output the shape of `base_out`; `base_out` itself where it is written to."""
    out, projected = forward(rows_of(hidden_states), rows_of(base_out), *rest)
    inplace = rest[-1]
    # no view: autograd forbids models to change a view that a Function returns in place, as Falcon does
    return base_out if inplace else torch.ops.aten._unsafe_view(out, base_out.shape), projected


def differentiable(forward: Forward, backward: Backward, *, is_traceable: bool = False) -> Run:
    """Make the `run` of a backend from its forward and backward. Double backward raises.

    `is_traceable` promises that `forward` is made of differentiable operations: under `torch.compile` it is then traced
    as it stands, and the compiler derives and fuses the backward.
    """
    kernel = (forward, backward)

    def run(
        hidden_states: torch.Tensor,
        base_out: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        top_k_weights: torch.Tensor | None,
        plan: DispatchPlan | None,
        scaling: float,
        inplace: bool,
    ) -> torch.Tensor:
        arguments = (hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)
        if is_traceable and torch.compiler.is_compiling():
            return flattened(forward, *arguments)[0]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
            out: torch.Tensor = _LoraExperts.apply(*arguments, kernel)  # type: ignore[no-untyped-call]
            return out
        return flattened(forward, *arguments)[0]

    return run
