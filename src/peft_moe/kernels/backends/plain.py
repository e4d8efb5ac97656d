"""`plain`: ordinary LoRA, one expert that every token uses, in five matrix products and no scaling pass."""

from __future__ import annotations

import torch

from ..call import Call, Gradients, Needs, differentiable
from . import Backend, Case


def supports(case: Case) -> tuple[bool, str]:
    """Only without dispatch."""
    if case.is_dispatched:
        return False, f"it is ordinary LoRA without dispatch (plan=None), but the plan has {case.num_experts} experts"
    return True, "one expert, no dispatch"


def weighted(projected_TR: torch.Tensor, weights_T1: torch.Tensor | None) -> torch.Tensor:
    """Multiply in the wider dtype of the two, round once."""
    return projected_TR if weights_T1 is None else (projected_TR * weights_T1).to(projected_TR.dtype)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Two products; the second adds to the base output and scales on the way."""
    projected_TR = torch.mm(call.x, call.A[0].t())
    add = call.base.addmm_ if call.inplace else call.base.addmm
    return add(weighted(projected_TR, call.weights), call.B[0], alpha=call.scaling), projected_TR


def backward(grad_TO: torch.Tensor, call: Call, projected_TR: torch.Tensor, needs: Needs) -> Gradients:
    """`g = s·dy Bᵀ; dB = s·(w h)ᵀ dy; dw = Σ_r h g; dh = w g; dA = dhᵀ x; dx = dh A`."""
    grad_x = grad_A = grad_B = grad_weights = None
    weights_T1 = call.weights
    if needs.B:
        grad_B = torch.mm((weighted(projected_TR, weights_T1) * call.scaling).t(), grad_TO).unsqueeze(0)
    if needs.x or needs.A or needs.weights:
        grad_projected_TR = torch.mm(grad_TO, call.B[0].t()) * call.scaling
        if needs.weights and weights_T1 is not None:
            grad_weights = (projected_TR.to(weights_T1.dtype) * grad_projected_TR).sum(-1, keepdim=True)
            grad_weights = grad_weights.to(weights_T1.dtype)
        grad_projected_TR = weighted(grad_projected_TR, weights_T1)
        if needs.A:
            grad_A = torch.mm(grad_projected_TR.t(), call.x).unsqueeze(0)
        if needs.x:
            grad_x = torch.mm(grad_projected_TR, call.A[0])
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="plain",
    summary="ordinary LoRA, hand-fused; chosen where there is no dispatch",
    run=differentiable(forward, backward, is_traceable=True),
    supports=supports,
    traces_fullgraph=True,
    needs_plan=False,
)
