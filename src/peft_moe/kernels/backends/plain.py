"""`plain`: ordinary LoRA, one expert that every token uses, in five matrix products and no scaling pass."""

from __future__ import annotations

import torch

from ..backend import Backend
from ..case import Case
from ..function import Needs, differentiable
from ..plan import DispatchPlan


def supports(case: Case) -> tuple[bool, str]:
    """Only without dispatch."""
    if case.is_dispatched:
        return False, f"it is ordinary LoRA without dispatch (plan=None), but the plan has {case.num_experts} experts"
    return True, "one expert, no dispatch"


def weighted(projected_TR: torch.Tensor, weights_T1: torch.Tensor | None) -> torch.Tensor:
    """Multiply in the wider dtype of the two, round once."""
    return projected_TR if weights_T1 is None else (projected_TR * weights_T1).to(projected_TR.dtype)


def forward(
    x_TD: torch.Tensor,
    base_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_T1: torch.Tensor | None,
    plan: DispatchPlan | None,
    scaling: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two products; the second adds to the base output and scales on the way."""
    projected_TR = torch.mm(x_TD, A[0].t())
    add = base_TO.addmm_ if inplace else base_TO.addmm
    return add(weighted(projected_TR, weights_T1), B[0], alpha=scaling), projected_TR


def backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_T1: torch.Tensor | None,
    projected_TR: torch.Tensor,
    plan: DispatchPlan | None,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """`g = s·dy Bᵀ; dB = s·(w h)ᵀ dy; dw = Σ_r h g; dh = w g; dA = dhᵀ x; dx = dh A`."""
    grad_x = grad_A = grad_B = grad_weights = None
    if needs.B:
        grad_B = torch.mm((weighted(projected_TR, weights_T1) * scaling).t(), grad_TO).unsqueeze(0)
    if needs.hidden_states or needs.A or needs.top_k_weights:
        grad_projected_TR = torch.mm(grad_TO, B[0].t()) * scaling
        if needs.top_k_weights and weights_T1 is not None:
            grad_weights = (projected_TR.to(weights_T1.dtype) * grad_projected_TR).sum(-1, keepdim=True)
            grad_weights = grad_weights.to(weights_T1.dtype)
        grad_projected_TR = weighted(grad_projected_TR, weights_T1)
        if needs.A:
            grad_A = torch.mm(grad_projected_TR.t(), x_TD).unsqueeze(0)
        if needs.hidden_states:
            grad_x = torch.mm(grad_projected_TR, A[0])
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="plain",
    summary="ordinary LoRA, hand-fused; chosen where there is no dispatch",
    run=differentiable(forward, backward, is_traceable=True),
    supports=supports,
    traces_fullgraph=True,
    needs_plan=False,
)
