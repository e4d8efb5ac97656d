"""`gather`: each token brings its own copy of the experts it chose; no sort. For a handful of tokens (decode).

The copies take N·R·(D + O) elements, so it refuses more than `MAX_COPIED_ELEMENTS`. C = K·R columns per token.
"""

from __future__ import annotations

import torch

from ..backend import Backend
from ..case import Case
from ..function import Needs, differentiable
from ..plan import DispatchPlan


MAX_COPIED_ELEMENTS = 2**28


def supports(case: Case) -> tuple[bool, str]:
    """Only while the copies of the experts stay small."""
    copied = case.num_tokens * max(case.top_k, 1) * case.rank * (case.in_features + case.out_features)
    if copied > MAX_COPIED_ELEMENTS:
        return (
            False,
            f"it copies the chosen experts for each token, here {copied} elements (limit {MAX_COPIED_ELEMENTS})",
        )
    return True, f"copies {copied} elements"


def chosen(experts: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """`(E, R, W)` → `(T, K·R, W)`: the chosen experts of each token, stacked along the rank."""
    rows = experts.index_select(0, plan.top_k_index.reshape(-1))
    return rows.view(plan.num_tokens, plan.top_k * experts.shape[1], experts.shape[2])


def weighted(projected_T1C: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """Multiply each slot's block of R columns by its weight, in the wider dtype of the two."""
    if weights_TK is None:
        return projected_T1C
    num_tokens, top_k = weights_TK.shape
    blocks_TKR = projected_T1C.view(num_tokens, top_k, projected_T1C.shape[2] // top_k) * weights_TK.unsqueeze(-1)
    return blocks_TKR.to(projected_T1C.dtype).view(projected_T1C.shape)


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
    """Two batched products with the token as the batch."""
    projected_T1C = torch.bmm(x_TD.unsqueeze(1), chosen(A, plan).transpose(1, 2))
    add = base_TO.unsqueeze(1).baddbmm_ if inplace else base_TO.unsqueeze(1).baddbmm
    out_T1O = add(weighted(projected_T1C, weights_TK), chosen(B, plan), alpha=scaling)
    return base_TO if inplace else out_T1O.squeeze(1), projected_T1C


def per_expert(rows_TCW: torch.Tensor, plan: DispatchPlan, like: torch.Tensor) -> torch.Tensor:
    """`(T, K·R, W)` → `(E, R, W)`: sum the gradients of the copies."""
    rows_NRW = rows_TCW.view(plan.num_tokens * plan.top_k, *like.shape[1:])
    return torch.zeros_like(like).index_add_(0, plan.top_k_index.reshape(-1), rows_NRW)


def backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_TK: torch.Tensor | None,
    projected_T1C: torch.Tensor,
    plan: DispatchPlan,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """As `plain`, batched over tokens, with the gradients of the copies summed per expert."""
    grad_x = grad_A = grad_B = grad_weights = None
    grad_T1O = grad_TO.unsqueeze(1)
    if needs.B:
        scaled_TC1 = (weighted(projected_T1C, weights_TK) * scaling).transpose(1, 2)
        grad_B = per_expert(scaled_TC1 * grad_T1O, plan, B)
    if needs.hidden_states or needs.A or needs.top_k_weights:
        grad_projected_T1C = torch.bmm(grad_T1O, chosen(B, plan).transpose(1, 2)) * scaling
        if needs.top_k_weights and weights_TK is not None:
            product_T1C = projected_T1C.to(weights_TK.dtype) * grad_projected_T1C
            grad_weights = product_T1C.view(*weights_TK.shape, B.shape[1]).sum(-1).to(weights_TK.dtype)
        grad_projected_T1C = weighted(grad_projected_T1C, weights_TK)
        if needs.A:
            grad_A = per_expert(grad_projected_T1C.transpose(1, 2) * x_TD.unsqueeze(1), plan, A)
        if needs.hidden_states:
            grad_x = torch.bmm(grad_projected_T1C, chosen(A, plan)).squeeze(1)
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="gather",
    summary="a copy of the chosen experts per token, for a handful of tokens",
    run=differentiable(forward, backward),
    supports=supports,
)
