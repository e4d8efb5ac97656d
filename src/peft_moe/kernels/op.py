"""`lora_experts`: add the chosen LoRA experts of each token to the output of a frozen layer."""

from __future__ import annotations

import torch

from .backends import Backend, Case, backend_for
from .call import Call
from .plan import DispatchPlan, per_token


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
            Weights of the experts; `None` is 1 everywhere. May require a gradient. `(B, K)` where the plan routes
            whole examples.
        scaling (`float`):
            LoRA's alpha / r.
        backend (`str`):
            `"auto"` or the name of a backend. A named backend that cannot run raises. The environment variable
            `PEFT_MOE_KERNEL_BACKEND` replaces `"auto"`.
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
    call = Call(hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)  # type: ignore[arg-type]
    case = case_of(call)
    chosen = backend_for(backend, case)
    if plan is None and chosen.needs_plan:
        plan = DispatchPlan.single_expert(case.num_tokens, A.device)
    if plan is not None and top_k_weights is not None and not chosen.takes_examples:
        top_k_weights = per_token(top_k_weights, plan.tokens_per_example)
    if A.dtype == torch.float64 and top_k_weights is not None:
        top_k_weights = top_k_weights.double()
    call = call._replace(weights=top_k_weights, plan=plan)  # type: ignore[arg-type]
    if torch.is_autocast_enabled(case.device):
        with torch.autocast(case.device, enabled=False):
            return run_in_one_dtype(chosen, call)
    return run_in_one_dtype(chosen, call)


def run_in_one_dtype(backend: Backend, call: Call) -> torch.Tensor:
    """Run a backend in the dtype of `A` and return the dtype of `base`."""
    if call.base.dtype != call.A.dtype:
        return backend.run(call._replace(base=call.base.to(call.A.dtype), inplace=False)).to(call.base.dtype)
    return backend.run(call._replace(inplace=False) if call.inplace and not call.base.is_contiguous() else call)


def case_of(call: Call) -> Case:
    """The case of a call as the user made it, or `ValueError` with every problem of its arguments."""
    hidden_states, base_out, A, B, top_k_weights, plan = call[:6]
    x_shape, out_shape, A_shape, B_shape = hidden_states.shape, base_out.shape, A.shape, B.shape
    if len(A_shape) == len(B_shape) == 3 and len(x_shape) == len(out_shape) > 0:
        num_experts, rank, in_features = A_shape
        out_features = B_shape[2]
        num_tokens = x_shape[0] if len(x_shape) == 2 else x_shape[:-1].numel()
        top_k, plan_examples, plan_experts, tokens_per_example = 0, num_tokens, 1, 1
        if plan is not None:
            (plan_examples, top_k), plan_experts = plan.example_index.shape, plan.num_experts
            tokens_per_example = plan.tokens_per_example
        dtype, device = A.dtype, A.device
        fits = (
            x_shape[-1] == in_features
            and B_shape[0] == num_experts == plan_experts
            and B_shape[1] == rank
            and out_shape[-1] == out_features
            and out_shape[:-1] == x_shape[:-1]
            and plan_examples * tokens_per_example == num_tokens
            and hidden_states.dtype == dtype == B.dtype
            and hidden_states.device == device == B.device == base_out.device
            and (top_k_weights is None or top_k_weights.shape == (plan_examples, top_k or 1))
        )
        if fits:
            sizes = (num_tokens, in_features, out_features, num_experts, rank, top_k)
            return Case(*sizes, dtype, device.type, tokens_per_example)
    raise ValueError(" ".join(problems_of(call)))


def problems_of(call: Call) -> list[str]:
    """Every problem of the arguments as a sentence. Not on the hot path."""
    hidden_states, base_out, A, B, top_k_weights, plan = call[:6]
    if A.dim() != 3 or B.dim() != 3 or hidden_states.dim() == 0 or base_out.dim() == 0:
        return [
            "lora_experts needs A (E, R, D), B (E, R, O), hidden_states (..., D) and base_out (..., O), but got "
            f"A {tuple(A.shape)}, B {tuple(B.shape)}, hidden_states {tuple(hidden_states.shape)} and base_out "
            f"{tuple(base_out.shape)}. Stack the experts in the first dimension."
        ]
    found = ["lora_experts cannot run:"]
    num_tokens = hidden_states.shape[:-1].numel()
    if hidden_states.shape[-1] != A.shape[-1]:
        found.append(
            f"hidden_states is {hidden_states.shape[-1]} wide, but A takes {A.shape[-1]}. Pass the layer's input."
        )
    if B.shape[:2] != A.shape[:2]:
        found.append(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} differ in experts or rank. B is (E, R, O), rank first."
        )
    if base_out.shape != (*hidden_states.shape[:-1], B.shape[-1]):
        found.append(
            f"base_out is {tuple(base_out.shape)}, but hidden_states {tuple(hidden_states.shape)} and B need "
            f"{(*hidden_states.shape[:-1], B.shape[-1])}. Pass the output of the frozen layer for the same tokens."
        )
    dtypes = (hidden_states.dtype, A.dtype, B.dtype)
    if len(set(dtypes)) > 1:
        found.append(
            f"hidden_states, A and B are {dtypes}. Cast hidden_states with .to(A.dtype), and keep A and B alike."
        )
    devices = {str(tensor.device) for tensor in (hidden_states, base_out, A, B)}
    if len(devices) > 1:
        found.append(f"the tensors are on {sorted(devices)}. Move them to one device.")
    if plan is None and A.shape[0] != 1:
        found.append(f"there is no plan, but A holds {A.shape[0]} experts. Pass plan=DispatchPlan.from_index(...).")
    if plan is not None and (plan.num_experts, plan.num_tokens) != (A.shape[0], num_tokens):
        found.append(
            f"the plan is for {plan.num_tokens} tokens and {plan.num_experts} experts, but there are {num_tokens} "
            f"tokens and {A.shape[0]} experts. Make the plan from the routing of this batch."
        )
    expected = (num_tokens, 1) if plan is None else tuple(plan.example_index.shape)
    if top_k_weights is not None and tuple(top_k_weights.shape) != expected:
        found.append(f"top_k_weights is {tuple(top_k_weights.shape)}, but must be {expected}, as the plan's index is.")
    return found
