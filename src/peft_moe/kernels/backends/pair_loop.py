"""`pair_loop`: two vector-matrix products per (token, expert) pair on views of the experts; no sort, no copy (CPU only).

For decoding, where reading the chosen experts once is all the work there is. Not for training: its backward is that of
`gather`.
"""

from __future__ import annotations

import torch

from ..backend import Backend
from ..case import Case
from ..function import differentiable
from ..plan import DispatchPlan
from .gather import backward


MAX_PAIRS = 64


def supports(case: Case) -> tuple[bool, str]:
    """Only a few pairs, and only on the CPU, because the chosen experts are read by the host."""
    if case.device != "cpu":
        return False, f"it reads the chosen experts on the host and is for 'cpu', but the tensors are on {case.device!r}"
    pairs = case.num_tokens * max(case.top_k, 1)
    if pairs > MAX_PAIRS:
        return False, f"it is for at most {MAX_PAIRS} (token, expert) pairs, but there are {pairs}"
    return True, f"{pairs} pairs on the CPU"


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
    """Weight and scaling are applied inside of the second product."""
    out_TO = base_TO if inplace else base_TO.clone()
    weights = None if weights_TK is None else weights_TK.tolist()
    rank = A.shape[1]
    projected_T1C = A.new_empty(plan.num_tokens, 1, plan.top_k * rank)
    for token, experts in enumerate(plan.top_k_index.tolist()):
        x, out, columns = x_TD[token].unsqueeze(0), out_TO[token].unsqueeze(0), projected_T1C[token]
        for slot, (expert, h) in enumerate(zip(experts, torch.split_with_sizes(columns, [rank] * plan.top_k, dim=1))):
            torch.mm(x, A[expert].t(), out=h)
            out.addmm_(h, B[expert], alpha=scaling if weights is None else scaling * weights[token][slot])
    return out_TO, projected_T1C


BACKEND = Backend(
    name="pair_loop",
    summary="two products per (token, expert) pair on views of the experts, for decoding on a CPU",
    run=differentiable(forward, backward),
    supports=supports,
)
