"""`lora_experts`: add the chosen LoRA experts of each token to the output of a frozen layer."""

from __future__ import annotations

import torch

from .backend import Backend, Run
from .case import Case
from .plan import DispatchPlan, per_token
from .registry import BACKENDS
from .selection import backend_of, decide, forced_backend
from .validation import check_arguments


def lora_experts(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    plan: DispatchPlan | None = None,
    top_k_weights: torch.Tensor | None = None,
    scaling: float = 1.0,
    backend: str = "auto",
    inplace: bool = False,
) -> torch.Tensor:
    """Compute `base_out_t + Σ_k scaling · w_tk · B_e A_e x_t`, where `e` is the k-th expert of token t.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., D)`):
            Input of the layer, after dropout, in the dtype of `A`.
        base_out (`torch.Tensor` of shape `(..., O)`):
            Output of the frozen layer. Another dtype than that of `A` is converted, summed and converted back.
        A (`torch.Tensor` of shape `(E, R, D)`):
            Down projections.
        B (`torch.Tensor` of shape `(E, R, O)`):
            Up projections, rank first, so that all experts together are one `(E·R, O)` matrix.
        plan (`DispatchPlan`, *optional*):
            Where the T tokens go; T is the product of the leading dimensions. `None` is ordinary LoRA: E = 1, used by
            every token.
        top_k_weights (`torch.Tensor` of shape `(T, K)`, *optional*):
            Weights of the experts; `None` is 1 everywhere. May require a gradient. `(B, K)` where the plan routes whole
            examples.
        scaling (`float`):
            LoRA's alpha / r.
        backend (`str`):
            `"auto"` or the name of a backend. A named backend that cannot run raises. The environment variable
            `PEFT_MOE_KERNEL_BACKEND` replaces `"auto"`; `PEFT_MOE_KERNEL_CACHE` names a file in which `"auto"` keeps what
            it measured.
        inplace (`bool`):
            Write the result into `base_out`, which saves a fresh buffer of its size. Only for a `base_out` that
            nobody else needs: fresh from the layer, not a leaf that requires a gradient, not a view, not kept by a
            hook, and made by an operation whose backward does not read its output (a linear layer does not). A
            permission, not a demand: not used where `base_out` is not contiguous or has to be converted.

    Returns:
        `torch.Tensor` of the shape and dtype of `base_out`. Differentiable once, in every tensor argument.

    Raises:
        `ValueError`: if shapes, dtypes or devices do not fit together, or the backend does not exist.
        `RuntimeError`: if a named backend cannot run this case.

    >>> import torch
    >>> from peft_moe.kernels import DispatchPlan, lora_experts
    >>> plan = DispatchPlan.from_index(torch.tensor([[0], [1]]), num_experts=2)
    >>> A, B = torch.ones(2, 1, 3), torch.tensor([[[1.0]], [[10.0]]])
    >>> lora_experts(torch.ones(2, 3), torch.zeros(2, 1), A, B, plan=plan)
    tensor([[ 3.],
            [30.]])
    """
    case = check_arguments(hidden_states, base_out, A, B, plan, top_k_weights)
    chosen = backend_for(backend, case)
    run = chosen.run
    if plan is None and chosen.needs_plan:
        plan = DispatchPlan.single_expert(case.num_tokens, A.device)
    if plan is not None and top_k_weights is not None and not chosen.takes_examples:
        top_k_weights = per_token(top_k_weights, plan.tokens_per_example)
    if A.dtype == torch.float64 and top_k_weights is not None:
        top_k_weights = top_k_weights.double()
    if torch.is_autocast_enabled(case.device):
        with torch.autocast(case.device, enabled=False):
            return call(run, hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)
    return call(run, hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)


def call(
    run: Run,
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    plan: DispatchPlan | None,
    scaling: float,
    inplace: bool,
) -> torch.Tensor:
    """Run a backend in the dtype of `A` and return the dtype of `base_out`."""
    if base_out.dtype != A.dtype:
        out = run(hidden_states, base_out.to(A.dtype), A, B, top_k_weights, plan, scaling, False)
        return out.to(base_out.dtype)
    return run(hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace and base_out.is_contiguous())


def backend_for(requested: str, case: Case) -> Backend:
    """The backend of a call; without cache and log where a compiler traces, as it would trace those too."""
    if torch.compiler.is_compiling():
        return BACKENDS[decide(requested, forced_backend(), case, is_compiling=True).backend]
    return backend_of(requested, case)
