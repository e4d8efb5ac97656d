"""`eager`: the definition of the op, a loop over experts in ordinary differentiable torch."""

from __future__ import annotations

import torch

from ..call import Call
from . import Backend


def run(call: Call) -> torch.Tensor:
    """`out_t = base_t + Σ_k scaling · w_tk · B_e A_e x_t` with `e = top_k_index[t, k]`."""
    out = call.base if call.inplace else call.base.clone(memory_format=torch.contiguous_format)
    rows, x = out.view(-1, out.shape[-1]), call.x.reshape(-1, call.x.shape[-1])
    for expert in range(call.plan.num_experts):
        token, slot = torch.where(call.plan.top_k_index == expert)
        update = x[token] @ call.A[expert].T @ call.B[expert] * call.scaling
        if call.weights is not None:
            update = (update * call.weights[token, slot, None]).to(update.dtype)
        # every expert takes part, also one without tokens, so that its gradient is 0 and not missing
        rows.index_add_(0, token, update)
    return out


BACKEND = Backend(name="eager", summary="loop over experts; the definition of the op", run=run)
