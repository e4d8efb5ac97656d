"""`grouped_mm`: sorted tokens and torch's grouped matrix product. No host sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..call import Call, Gradients, Needs, differentiable
from ..plan import DispatchPlan
from . import Backend, Case


STRIDE_BYTES = 16


def is_usable() -> tuple[bool, str]:
    """Needs `torch.nn.functional.grouped_mm`."""
    if not hasattr(F, "grouped_mm"):
        return False, f"torch {torch.__version__} has no nn.functional.grouped_mm; install torch >= 2.9"
    return True, "torch.nn.functional.grouped_mm is there"


def supports(case: Case) -> tuple[bool, str]:
    """No float64, and every width a multiple of 16 bytes."""
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"torch's grouped_mm takes float32, bfloat16 and float16, not {case.dtype}"
    multiple = STRIDE_BYTES // case.dtype.itemsize
    widths = {"in_features": case.in_features, "out_features": case.out_features, "rank": case.rank}
    odd = [f"{name}={width}" for name, width in widths.items() if width % multiple]
    if odd:
        return False, f"torch's grouped_mm needs multiples of {multiple} in {case.dtype}, but {odd} are not"
    return True, "dtype and widths fit"


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and starting at a multiple of 16 bytes as grouped_mm demands."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % STRIDE_BYTES == 0 else tensor.clone()


def row_weights(call: Call) -> torch.Tensor | float:
    """Weight times scaling in the order of rows, `(N, 1)`; the bare scaling where every weight is 1."""
    if call.weights is None:
        return call.scaling
    return call.weights.reshape(-1).index_select(0, call.plan.pair_of_row).unsqueeze(1) * call.scaling


def combined(rows_NW: torch.Tensor, plan: DispatchPlan, onto_TW: torch.Tensor | None) -> torch.Tensor:
    """Sum the K rows of each token, always in the same order: on CUDA slot by slot, as its `index_add_` is not."""
    if rows_NW.device.type == "cpu":
        if onto_TW is None:
            onto_TW = rows_NW.new_zeros(plan.num_tokens, rows_NW.shape[1])
        return onto_TW.index_add_(0, plan.token_of_row, rows_NW)
    for slot in range(plan.top_k):
        of_slot_TW = rows_NW.index_select(0, plan.row_of_pair[:, slot])
        onto_TW = of_slot_TW if onto_TW is None else onto_TW.add_(of_slot_TW)
    assert onto_TW is not None
    return onto_TW


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather, grouped shrink, weigh, grouped expand, combine."""
    x_TD, A, B, plan = call.x, call.A, call.B, call.plan
    out_TO = call.base if call.inplace else call.base.clone()
    if x_TD.shape[0] == 0:
        return out_TO, x_TD.new_empty(0, A.shape[1])
    x_ND = x_TD.index_select(0, plan.token_of_row)
    projected_NR = F.grouped_mm(x_ND, aligned(A).transpose(1, 2), offs=plan.row_ends)
    weighted_NR = (projected_NR * row_weights(call)).to(x_TD.dtype)
    return combined(F.grouped_mm(weighted_NR, aligned(B), offs=plan.row_ends), plan, out_TO), projected_NR


def backward(grad_TO: torch.Tensor, call: Call, projected_NR: torch.Tensor, needs: Needs) -> Gradients:
    """The same products transposed; the derivative of torch's own would refuse an expanded gradient."""
    A, B, plan, weights_TK = call.A, call.B, call.plan, call.weights
    if grad_TO.shape[0] == 0:
        empty = (grad_TO.new_empty(0, A.shape[2]), A, B, weights_TK)
        return tuple(None if like is None else torch.zeros_like(like) for like in empty)
    grad_x = grad_A = grad_B = grad_weights = None
    weights_N1 = row_weights(call)
    grad_NO = grad_TO.index_select(0, plan.token_of_row)
    if needs.B:
        weighted_NR = (projected_NR * weights_N1).to(grad_TO.dtype)
        grad_B = F.grouped_mm(weighted_NR.t(), grad_NO, offs=plan.row_ends)
    if needs.x or needs.A or needs.weights:
        grad_projected_NR = F.grouped_mm(grad_NO, aligned(B).transpose(1, 2), offs=plan.row_ends)
        del grad_NO
        if needs.weights and weights_TK is not None:
            grad_rows_N = (projected_NR.to(weights_TK.dtype) * grad_projected_NR).sum(-1).mul_(call.scaling)
            grad_weights = grad_rows_N[plan.row_of_pair].to(weights_TK.dtype)
        grad_projected_NR = (grad_projected_NR * weights_N1).to(grad_TO.dtype)
        if needs.A:
            x_ND = call.x.index_select(0, plan.token_of_row)
            grad_A = F.grouped_mm(grad_projected_NR.t(), x_ND, offs=plan.row_ends)
        if needs.x:
            grad_x = combined(F.grouped_mm(grad_projected_NR, aligned(A), offs=plan.row_ends), plan, None)
    return grad_x, grad_A, grad_B, grad_weights


BACKEND = Backend(
    name="grouped_mm",
    summary="sorted tokens and torch's grouped matrix product",
    run=differentiable(forward, backward),
    is_usable=is_usable,
    supports=supports,
)
