"""What the op must compute, token by token in float64, straight from the formula. Shares no code with the package."""

from __future__ import annotations

import torch


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
    inputs: dict[str, torch.Tensor],
    top_k_index: torch.Tensor,
    scaling: float,
    grad_out: torch.Tensor,
    tokens_per_example: int = 1,
) -> dict[str, torch.Tensor]:
    """`out` and the gradient of each input, in float64, from inputs of any dtype."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    flat = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in leaves.items() if tensor.dim() < 3}
    out = lora_experts_oracle(
        flat["hidden_states"],
        flat["base_out"],
        leaves["A"],
        leaves["B"],
        [row for row in top_k_index.tolist() for _ in range(tokens_per_example)],
        torch.stack([row for row in flat["top_k_weights"] for _ in range(tokens_per_example)])
        if top_k_index.shape[0]
        else flat["top_k_weights"],
        scaling,
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.double(), allow_unused=True)
    named = zip(leaves, gradients)
    return {"out": out.detach()} | {
        name: torch.zeros_like(leaves[name]) if gradient is None else gradient for name, gradient in named
    }
