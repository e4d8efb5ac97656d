"""`pair_loop`: two products per (token, expert) pair on views of the experts; no sort, no copy (CPU only).

For decoding, where reading the chosen experts once is all the work there is. Not for training: its backward is that of
`gather`.
"""

from __future__ import annotations

import torch

from ..call import Call, differentiable
from ..plan import per_token
from . import Backend, Case
from .gather import backward


MAX_PAIRS = 64


def supports(case: Case) -> tuple[bool, str]:
    """Only a few pairs, and only on the CPU, because the chosen experts are read by the host."""
    if case.device != "cpu":
        return False, f"it reads the experts on the host and is for 'cpu', but the tensors are on {case.device!r}"
    if case.num_pairs > MAX_PAIRS:
        return False, f"it is for at most {MAX_PAIRS} (token, expert) pairs, but there are {case.num_pairs}"
    return True, f"{case.num_pairs} pairs on the CPU"


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scaling are applied inside of the second product."""
    A, B, plan, scaling = call.A, call.B, call.plan, call.scaling
    out_TO = call.base if call.inplace else call.base.clone()
    weights = None if call.weights is None else per_token(call.weights, plan.tokens_per_example).tolist()
    num_tokens, top_k = plan.num_tokens, plan.top_k
    projected_N1R = A.new_empty(num_tokens * top_k, 1, A.shape[1])
    columns = iter(projected_N1R.unbind(0))
    for token, experts in enumerate(plan.top_k_index.tolist()):
        # a slice costs as much as a small product, and decoding has one token
        x, out = (call.x, out_TO) if num_tokens == 1 else (call.x[token : token + 1], out_TO[token : token + 1])
        for slot, (expert, h) in enumerate(zip(experts, columns)):
            torch.mm(x, A[expert].t(), out=h)
            out.addmm_(h, B[expert], alpha=scaling if weights is None else scaling * weights[token][slot])
    return out_TO, projected_N1R.view(plan.num_examples, plan.tokens_per_example, top_k * A.shape[1])


BACKEND = Backend(
    name="pair_loop",
    summary="two products per (token, expert) pair on views of the experts, for decoding on a CPU",
    run=differentiable(forward, backward),
    supports=supports,
    takes_examples=True,
)
