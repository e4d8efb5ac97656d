"""`dense`: every token through every expert at once, with the experts it did not choose masked in rank space.

Two large products instead of many small ones; no sort, no gather of tokens, no host sync. Costs E·R columns, so it
wins where E·R is small against the widths. C = E·R columns.
"""

from __future__ import annotations

import torch

from ..call import Call, Gradients, Needs, differentiable
from . import Backend


def gates(call: Call) -> torch.Tensor:
    """`(T, E, 1)`: the summed weight of each expert for each token, 0 where it was not chosen."""
    index_TK, weights_TK = call.plan.top_k_index, call.weights
    if weights_TK is None:
        weights_TK = torch.ones((), dtype=call.A.dtype, device=index_TK.device).expand(index_TK.shape)
    zeros_TE = torch.zeros(call.plan.num_tokens, call.plan.num_experts, dtype=weights_TK.dtype, device=index_TK.device)
    return zeros_TE.scatter_add(1, index_TK, weights_TK).unsqueeze(-1)


def masked(projected_TC: torch.Tensor, gates_TE1: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's block of R columns by its gate, in the wider dtype of the two."""
    num_tokens, num_experts, _ = gates_TE1.shape
    blocks_TER = projected_TC.view(num_tokens, num_experts, projected_TC.shape[1] // num_experts)
    return (blocks_TER * gates_TE1).to(projected_TC.dtype).view(projected_TC.shape)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """`out = base + s · (gates ∘ x Aᵀ) B`."""
    projected_TC = torch.mm(call.x, call.A.flatten(0, 1).t())
    add = call.base.addmm_ if call.inplace else call.base.addmm
    return add(masked(projected_TC, gates(call)), call.B.flatten(0, 1), alpha=call.scaling), projected_TC


def backward(grad_TO: torch.Tensor, call: Call, projected_TC: torch.Tensor, needs: Needs) -> Gradients:
    """`g = s·dy Bᵀ; dB = s·(G∘h)ᵀ dy; dw = gather(Σ_r h g); dh = G∘g; dA = dhᵀ x; dx = dh A`."""
    A, B, plan, weights_TK = call.A, call.B, call.plan, call.weights
    scaled_TE1 = gates(call) * call.scaling
    grad_x = grad_A = grad_B = grad_weights = None
    if needs.B:
        grad_B = torch.mm(masked(projected_TC, scaled_TE1).t(), grad_TO).view(B.shape)
    if needs.x or needs.A or needs.weights:
        grad_projected_TC = torch.mm(grad_TO, B.flatten(0, 1).t())
        if needs.weights and weights_TK is not None:
            blocks = (plan.num_tokens, *B.shape[:2])
            product_TER = projected_TC.view(blocks).to(weights_TK.dtype) * grad_projected_TC.view(blocks)
            grad_weights = product_TER.sum(-1).gather(1, plan.top_k_index).mul_(call.scaling).to(weights_TK.dtype)
        grad_projected_TC = masked(grad_projected_TC, scaled_TE1)
        if needs.A:
            grad_A = torch.mm(grad_projected_TC.t(), call.x).view(A.shape)
        if needs.x:
            grad_x = torch.mm(grad_projected_TC, A.flatten(0, 1))
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="dense",
    summary="masked dense products over all experts; no sort, no sync, compiles whole",
    run=differentiable(forward, backward, is_traceable=True),
    traces_fullgraph=True,
)
