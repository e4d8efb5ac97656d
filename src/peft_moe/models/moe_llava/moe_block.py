"""The sparse block that takes the place of a dense MLP."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_moe_llava import MoeLlavaConfig
from .dense_mlp import DenseMlp
from .experts import EXPERTS_CLASSES
from .router import MoeLlavaTopKRouter


class MoeLlavaSparseMoeBlock(nn.Module):
    """A router and its experts (MoE-LLaVA, eq. 4 to 6), with `use_residual` also the dense MLP (DeepSpeed-MoE).

    `y = Σ_k w_k FFN_k(x)`; with the dense MLP, `y = a · Σ_k w_k FFN_k(x) + b · FFN(x)`, `(a, b) = softmax(W x + c)`.

    Args:
        config (`MoeLlavaConfig`): routing options.
        mlp (`DenseMlp`): gives the sizes and the activation, and is kept where the configuration wants it.
        num_experts (`int`): number of experts (E).
        text_config (`PretrainedConfig`): names the implementation of the experts.
    """

    def __init__(self, config: MoeLlavaConfig, mlp: DenseMlp, num_experts: int, text_config: object) -> None:
        super().__init__()
        self.gate = MoeLlavaTopKRouter(config, mlp.hidden_size, num_experts)
        experts_class = EXPERTS_CLASSES[mlp.has_gate, mlp.has_bias]
        self.experts = experts_class(text_config, num_experts, mlp.hidden_size, mlp.intermediate_size, mlp.act_fn)
        self.use_residual = config.use_residual
        if self.use_residual:
            self.residual_mlp = mlp.module
            self.residual_gate = nn.Linear(mlp.hidden_size, 2)
        self._token_mask: torch.Tensor | None = None

    def take_token_mask(self, token_mask: torch.Tensor | None) -> None:
        """Remember which tokens of the coming call are padding (0), for a limited capacity. Shape `(B, S)`."""
        self._token_mask = token_mask

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` → `(..., D)`."""
        token_mask, self._token_mask = self._token_mask, None
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if token_mask is not None:
            token_mask = token_mask.reshape(-1).to(tokens.device)
        _, top_k_weights, top_k_index = self.gate(tokens, token_mask)
        output = self.experts(tokens, top_k_index, top_k_weights).reshape(hidden_states.shape)
        if self.use_residual:
            share = torch.softmax(self.residual_gate(hidden_states).float(), dim=-1).to(output.dtype)
            output = output * share[..., :1] + self.residual_mlp(hidden_states) * share[..., 1:]
        return output
