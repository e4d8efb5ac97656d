"""What the op must compute, token by token in float64, straight from the formula. Shares no code with the package."""

from __future__ import annotations

import torch
from kernel_cases import KernelCase, make_index


def lora_experts_oracle(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    top_k_index: list[list[int]],
    top_k_weights: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`y_t = base_t + Σ_k scaling · w_tk · Bᵀ_e (A_e x_t)`; all tensors float64, `(T, D)`, `(T, O)`, `(E, R, ·)`."""
    rows = []
    for t, experts in enumerate(top_k_index):
        y = base_out[t]
        for k, e in enumerate(experts):
            down = (A[e] * hidden_states[t]).sum(dim=1)
            up = (B[e] * down[:, None]).sum(dim=0)
            y = y + scaling * top_k_weights[t, k] * up
        rows.append(y)
    return torch.stack(rows) if rows else base_out * 1.0


def outputs_and_gradients(
    case: KernelCase, inputs: dict[str, torch.Tensor], grad_out: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`out` and the gradient of each input, in float64, from inputs of any dtype."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    x, base_out, weights = (
        leaves[name].reshape(-1, leaves[name].shape[-1]) for name in ("hidden_states", "base_out", "top_k_weights")
    )
    index = [row for row in make_index(case).tolist() for _ in range(case.tokens_per_example)]
    weights = weights.repeat_interleave(case.tokens_per_example, dim=0)
    out = lora_experts_oracle(x, base_out, leaves["A"], leaves["B"], index, weights, case.scaling)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), grad_out.double(), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(leaves, gradients))}
