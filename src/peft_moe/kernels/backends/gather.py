"""`gather`: each example brings its own copy of the experts it chose; no sort, one batched product.

Made for routing by example, where the copies are shared by all tokens of one, and for a handful of tokens (decode),
each of which is then an example of one token. The copies take B·K·R·(D + O) elements, so it refuses more than
`MAX_COPIED_ELEMENTS`. S tokens per example, C = K·R columns.
"""

from __future__ import annotations

import torch

from ..call import Call, Gradients, Needs, differentiable
from ..plan import DispatchPlan
from . import Backend, Case


MAX_COPIED_ELEMENTS = 2**28


def supports(case: Case) -> tuple[bool, str]:
    """Only while the copies of the experts stay small."""
    copied = case.num_examples * max(case.top_k, 1) * case.rank * (case.in_features + case.out_features)
    if copied > MAX_COPIED_ELEMENTS:
        return (
            False,
            f"it copies the chosen experts for each example, here {copied} elements (limit {MAX_COPIED_ELEMENTS})",
        )
    return True, f"copies {copied} elements"


def by_example(rows_TW: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """`(T, W)` → `(B, S, W)`, a view where that is possible."""
    return rows_TW.reshape(plan.num_examples, plan.tokens_per_example, rows_TW.shape[1])


def chosen(experts: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """`(E, R, W)` → `(B, K·R, W)`: the chosen experts of each example, stacked along the rank."""
    rows = experts.index_select(0, plan.example_index.reshape(-1))
    return rows.view(plan.num_examples, plan.top_k * experts.shape[1], experts.shape[2])


def weighted(projected_BSC: torch.Tensor, weights_BK: torch.Tensor | None) -> torch.Tensor:
    """Multiply each slot's block of R columns by its weight, in the wider dtype of the two."""
    if weights_BK is None:
        return projected_BSC
    num_examples, top_k = weights_BK.shape
    rank = projected_BSC.shape[2] // top_k
    weights_B1C = weights_BK.unsqueeze(-1).expand(num_examples, top_k, rank).reshape(num_examples, 1, top_k * rank)
    return (projected_BSC * weights_B1C).to(projected_BSC.dtype)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batched products with the example as the batch."""
    plan = call.plan
    projected_BSC = torch.bmm(by_example(call.x, plan), chosen(call.A, plan).transpose(1, 2))
    base_BSO = by_example(call.base, plan)
    add = base_BSO.baddbmm_ if call.inplace else base_BSO.baddbmm
    out_BSO = add(weighted(projected_BSC, call.weights), chosen(call.B, plan), alpha=call.scaling)
    return call.base if call.inplace else out_BSO.view(call.base.shape), projected_BSC


def per_expert(rows_BCW: torch.Tensor, plan: DispatchPlan, like: torch.Tensor) -> torch.Tensor:
    """`(B, K·R, W)` → `(E, R, W)`: sum the gradients of the copies."""
    rows_NRW = rows_BCW.view(plan.num_examples * plan.top_k, *like.shape[1:])
    return torch.zeros_like(like).index_add_(0, plan.example_index.reshape(-1), rows_NRW)


def backward(grad_TO: torch.Tensor, call: Call, projected_BSC: torch.Tensor, needs: Needs) -> Gradients:
    """As `plain`, batched over examples, with the gradients of the copies summed per expert."""
    A, B, plan, weights_BK = call.A, call.B, call.plan, call.weights
    grad_x = grad_A = grad_B = grad_weights = None
    grad_BSO = by_example(grad_TO, plan)
    if needs.B:
        scaled_BCS = (weighted(projected_BSC, weights_BK) * call.scaling).transpose(1, 2)
        grad_B = per_expert(torch.bmm(scaled_BCS, grad_BSO), plan, B)
    if needs.x or needs.A or needs.weights:
        grad_projected_BSC = torch.bmm(grad_BSO, chosen(B, plan).transpose(1, 2)) * call.scaling
        if needs.weights and weights_BK is not None:
            product_BSC = projected_BSC.to(weights_BK.dtype) * grad_projected_BSC
            product_BSKR = product_BSC.view(*product_BSC.shape[:2], plan.top_k, B.shape[1])
            grad_weights = product_BSKR.sum(dim=(1, 3)).to(weights_BK.dtype)
        grad_projected_BSC = weighted(grad_projected_BSC, weights_BK)
        if needs.A:
            grad_A = per_expert(torch.bmm(grad_projected_BSC.transpose(1, 2), by_example(call.x, plan)), plan, A)
        if needs.x:
            grad_x = torch.bmm(grad_projected_BSC, chosen(A, plan)).view(grad_TO.shape[0], A.shape[2])
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="gather",
    summary="a copy of the chosen experts per example; for routing by example and for a handful of tokens",
    run=differentiable(forward, backward, is_traceable=True),
    supports=supports,
    traces_fullgraph=True,
    takes_examples=True,
)
