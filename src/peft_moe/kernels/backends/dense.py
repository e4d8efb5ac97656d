"""`dense`: every token through every expert at once, with the experts it did not choose masked in rank space.

Two large products instead of many small ones; no sort, no gather of tokens, no host sync. Costs E·R columns, so it wins
where E·R is small against the widths. C = E·R columns.
"""

from __future__ import annotations

import torch

from ..backend import Backend
from ..function import Needs, differentiable
from ..plan import DispatchPlan


def gates(plan: DispatchPlan, weights_TK: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`(T, E, 1)`: the summed weight of each expert for each token, 0 where it was not chosen."""
    index_TK = plan.top_k_index
    if weights_TK is None:
        weights_TK = torch.ones((), dtype=dtype, device=index_TK.device).expand(index_TK.shape)
    zeros_TE = torch.zeros(plan.num_tokens, plan.num_experts, dtype=weights_TK.dtype, device=index_TK.device)
    return zeros_TE.scatter_add(1, index_TK, weights_TK).unsqueeze(-1)


def masked(projected_TC: torch.Tensor, gates_TE1: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's block of R columns by its gate, in the wider dtype of the two."""
    num_tokens, num_experts, _ = gates_TE1.shape
    blocks_TER = projected_TC.view(num_tokens, num_experts, projected_TC.shape[1] // num_experts)
    return (blocks_TER * gates_TE1).to(projected_TC.dtype).view(projected_TC.shape)


def forward(
    x_TD: torch.Tensor,
    base_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_TK: torch.Tensor | None,
    plan: DispatchPlan,
    scaling: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out = base_out + s · (gates ∘ x Aᵀ) B`."""
    projected_TC = torch.mm(x_TD, A.flatten(0, 1).t())
    masked_TC = masked(projected_TC, gates(plan, weights_TK, x_TD.dtype))
    add = base_TO.addmm_ if inplace else base_TO.addmm
    return add(masked_TC, B.flatten(0, 1), alpha=scaling), projected_TC


def backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_TK: torch.Tensor | None,
    projected_TC: torch.Tensor,
    plan: DispatchPlan,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """`g = s·dy Bᵀ; dB = s·(G∘h)ᵀ dy; dw = gather(Σ_r h g); dh = G∘g; dA = dhᵀ x; dx = dh A`."""
    gates_TE1 = gates(plan, weights_TK, grad_TO.dtype)
    grad_x = grad_A = grad_B = grad_weights = None
    if needs.B:
        grad_B = torch.mm(masked(projected_TC, gates_TE1 * scaling).t(), grad_TO).view(B.shape)
    if needs.hidden_states or needs.A or needs.top_k_weights:
        grad_projected_TC = torch.mm(grad_TO, B.flatten(0, 1).t())
        if needs.top_k_weights and weights_TK is not None:
            blocks = (plan.num_tokens, *B.shape[:2])
            product_TER = projected_TC.view(blocks).to(weights_TK.dtype) * grad_projected_TC.view(blocks)
            grad_weights = product_TER.sum(-1).gather(1, plan.top_k_index).mul_(scaling).to(weights_TK.dtype)
        grad_projected_TC = masked(grad_projected_TC, gates_TE1 * scaling)
        if needs.A:
            grad_A = torch.mm(grad_projected_TC.t(), x_TD).view(A.shape)
        if needs.hidden_states:
            grad_x = torch.mm(grad_projected_TC, A.flatten(0, 1))
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="dense",
    summary="masked dense products over all experts; no sort, no sync, compiles whole",
    run=differentiable(forward, backward, is_traceable=True),
    traces_fullgraph=True,
)
