"""`eager`: the definition of the op, a loop over experts in ordinary differentiable torch."""

from __future__ import annotations

import torch

from ..backend import Backend
from ..plan import DispatchPlan


def run(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    plan: DispatchPlan,
    scaling: float,
    inplace: bool,
) -> torch.Tensor:
    """`out_t = base_out_t + Σ_k scaling · w_tk · B_e A_e x_t` with `e = top_k_index[t, k]`."""
    out = base_out if inplace else base_out.clone(memory_format=torch.contiguous_format)
    rows, hidden_states = out.view(-1, out.shape[-1]), hidden_states.reshape(-1, hidden_states.shape[-1])
    for expert in range(plan.num_experts):
        token, slot = torch.where(plan.top_k_index == expert)
        update = hidden_states[token] @ A[expert].T @ B[expert] * scaling
        if top_k_weights is not None:
            update = (update * top_k_weights[token, slot, None]).to(update.dtype)
        # every expert takes part, also one without tokens, so that its gradient is 0 and not missing
        rows.index_add_(0, token, update)
    return out


BACKEND = Backend(name="eager", summary="loop over experts; the definition of the op", run=run)
