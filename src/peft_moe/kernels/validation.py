"""Checks the arguments of the op: says what was wrong, what was found and what to do."""

from __future__ import annotations

import torch

from .case import Case
from .plan import DispatchPlan


def check_arguments(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    plan: DispatchPlan | None,
    top_k_weights: torch.Tensor | None,
) -> Case:
    """Return the case of a call, or raise `ValueError` with every problem of its arguments."""
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
            return Case(
                num_tokens,
                in_features,
                out_features,
                num_experts,
                rank,
                top_k,
                dtype,
                device.type,
                tokens_per_example,
            )
    raise ValueError(" ".join(problems(hidden_states, base_out, A, B, plan, top_k_weights)))


def problems(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    plan: DispatchPlan | None,
    top_k_weights: torch.Tensor | None,
) -> list[str]:
    """Every problem of the arguments as a sentence. Not on the hot path."""
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
            f"hidden_states is {hidden_states.shape[-1]} wide, but A takes {A.shape[-1]}. Pass the input of this layer."
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
            f"the plan is for {plan.num_tokens} tokens and {plan.num_experts} experts, but there are {num_tokens} tokens "
            f"and {A.shape[0]} experts. Make the plan from the routing of this batch."
        )
    expected = (num_tokens, 1) if plan is None else tuple(plan.example_index.shape)
    if top_k_weights is not None and tuple(top_k_weights.shape) != expected:
        found.append(f"top_k_weights is {tuple(top_k_weights.shape)}, but must be {expected}, as the plan's index is.")
    return found
