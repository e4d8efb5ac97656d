"""`Call`: what a backend is given; and the way from a hand-written forward and backward to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .plan import DispatchPlan


class Call(NamedTuple):
    """One call of the op: `base + scaling · Σ_k w_tk B_e A_e x_t`, e the k-th expert of token t.

    Args:
        x (`torch.Tensor` of shape `(..., D)`): input; `(T, D)` in a [`Forward`] or [`Backward`].
        base (`torch.Tensor` of shape `(..., O)`): what is added to; `(T, O)` in a [`Forward`].
        A (`torch.Tensor` of shape `(E, R, D)`), B (`torch.Tensor` of shape `(E, R, O)`): the experts.
        weights (`torch.Tensor`, *optional*):
            `(T, K)`, or `(B, K)` for a backend that `takes_examples`; `None` is 1 everywhere.
        plan (`DispatchPlan`): where the tokens go; `None` only for a backend without `needs_plan`.
        scaling (`float`): LoRA's alpha / r.
        inplace (`bool`): whether the result is written into `base`.

    `x`, `base`, `A` and `B` have one dtype and device.
    """

    x: torch.Tensor
    base: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    weights: torch.Tensor | None
    plan: DispatchPlan
    scaling: float
    inplace: bool


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    A: bool
    B: bool
    weights: bool


Gradients = tuple["torch.Tensor | None", ...]
# call -> (out, projected); `projected` is A x in the backend's own layout, unweighted and unscaled
Forward = Callable[[Call], "tuple[torch.Tensor, torch.Tensor]"]
# (grad_TO, call, projected, needs) -> gradients in the order of `Needs`; the call has no `base` any more, `x` only
# where the gradient of A is wanted, and `projected` is there where that of B or of the weights is
Backward = Callable[[torch.Tensor, Call, Any, Needs], Gradients]


def differentiable(
    forward: Forward, backward: Backward, *, is_traceable: bool = False
) -> Callable[[Call], torch.Tensor]:
    """Make the `run` of a backend from its forward and backward. Double backward raises.

    `is_traceable` promises that `forward` is made of differentiable operations: under `torch.compile` it is then
    traced as it stands, and the compiler derives and fuses the backward.
    """

    def run(call: Call) -> torch.Tensor:
        is_traced = is_traceable and torch.compiler.is_compiling()
        if not is_traced and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:5]):
            out: torch.Tensor = _LoraExperts.apply(*call, forward, backward)  # type: ignore[no-untyped-call]
            return out
        return on_rows(forward, call)[0]

    return run


def on_rows(forward: Forward, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `forward` on rows and give its output the shape of `base`; `base` itself where it is written to."""
    out, projected = forward(call._replace(x=rows_of(call.x), base=rows_of(call.base)))
    # no view: autograd forbids models to change a view that a Function returns in place, as Falcon does
    return call.base if call.inplace else torch.ops.aten._unsafe_view(out, call.base.shape), projected


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., W)` → `(T, W)`, a view where that is possible."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


class _LoraExperts(torch.autograd.Function):
    """The op with the derivative left to the backend."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        call, forward = Call(*given[:8]), given[8]
        out, projected = on_rows(forward, call)
        _, _, needs_A, needs_B, needs_weights = ctx.needs_input_grad[:5]
        # only what a gradient reads: a frozen A, for one, lets go of the tokens
        ctx.save_for_backward(
            call.x if needs_A else None, call.A, call.B, call.weights, projected if needs_B or needs_weights else None
        )
        ctx.rest, ctx.kernel, ctx.x_shape = call[5:], given[9], call.x.shape
        if call.inplace:
            ctx.mark_dirty(call.base)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> Gradients:
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        grads: Gradients = (None, None, None, None)
        if any(needs):
            x, A, B, weights, projected = ctx.saved_tensors
            x = None if x is None else rows_of(x)
            call = Call(x, None, A, B, weights, *ctx.rest)  # type: ignore[arg-type]
            grad_TO, device = rows_of(grad_out).contiguous(), grad_out.device.type
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    grads = ctx.kernel(grad_TO, call, projected, needs)
            else:
                grads = ctx.kernel(grad_TO, call, projected, needs)
        grad_x = None if grads[0] is None else grads[0].view(ctx.x_shape)
        return (grad_x, grad_base, *grads[1:], None, None, None, None, None)
