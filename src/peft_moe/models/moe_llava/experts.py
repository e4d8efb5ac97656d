"""The sparse block that takes the place of a dense MLP: stacked MLPs as experts, and a router before them.

What computes the experts is chosen by transformers' experts interface (`experts_implementation`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.integrations import use_experts_implementation

from .configuration_moe_llava import MoeLlavaConfig
from .dense_mlp import DenseMlp
from .routing import MoeLlavaTopKRouter


class StackedExperts(nn.Module):
    """E MLPs of one shape. With a gate `W_down (act(W_gate x) ⊙ W_up x)`, without `W_down act(W_up x)`.

    Parameters, each with a `_bias` of shape `(E, rows)` where the class has biases: `gate_up_proj` `(E, 2F, D)`, gate
    first, or `up_proj` `(E, F, D)` without a gate, and `down_proj` `(E, D, F)`.

    Args:
        config (`PretrainedConfig`):
            Its `_experts_implementation` says what computes the experts; `"eager"` is the `forward` below.
        num_experts (`int`): number of experts (E).
        hidden_size (`int`): width of input and output (D).
        intermediate_size (`int`): width inside (F).
        act_fn: the activation.
    """

    has_gate = True
    has_bias = False

    def __init__(
        self, config: Any, num_experts: int, hidden_size: int, intermediate_size: int, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.act_fn = act_fn
        rows = {"gate_up_proj": 2 * intermediate_size} if self.has_gate else {"up_proj": intermediate_size}
        for name, num_rows in rows.items():
            self._add(name, num_rows, hidden_size)
        self._add("down_proj", hidden_size, intermediate_size)

    def _add(self, name: str, num_rows: int, num_columns: int) -> None:
        setattr(self, name, nn.Parameter(torch.empty(self.num_experts, num_rows, num_columns)))
        if self.has_bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, num_rows)))

    def reset_parameters(self, std: float) -> None:
        """Weights from a normal distribution of width `std`, biases 0."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(T, D)` → `(T, D)`: for each token the weighted sum of its experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`)
            top_k_index (`torch.Tensor` of shape `(T, K)`, int64):
                The experts of each token. `num_experts` stands for an expert on another device.
            top_k_weights (`torch.Tensor` of shape `(T, K)`)
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, position = torch.where(top_k_index == expert)
            expert_output = self._one(expert, hidden_states[token]) * top_k_weights[token, position, None]
            output.index_add_(0, token, expert_output.to(output.dtype))
        return output

    def _one(self, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.has_gate:
            inner = self._apply_gate(self._linear("gate_up_proj", expert, hidden_states))
        else:
            inner = self.act_fn(self._linear("up_proj", expert, hidden_states))
        return self._linear("down_proj", expert, inner)

    def _linear(self, name: str, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(hidden_states, getattr(self, name)[expert], bias)


@use_experts_implementation
class MoeLlavaGatedExperts(StackedExperts):
    """Gate, up and down without biases: Llama, Mistral, Qwen, Phi-3, StableLM, Gemma, SmolLM3, ..."""


@use_experts_implementation(has_bias=True)
class MoeLlavaGatedExpertsWithBias(StackedExperts):
    """Gate, up and down with biases: Llama with `mlp_bias`, ..."""

    has_bias = True


@use_experts_implementation(has_gate=False)
class MoeLlavaPlainExperts(StackedExperts):
    """Up and down without biases: Nemotron, ..."""

    has_gate = False


@use_experts_implementation(has_gate=False, has_bias=True)
class MoeLlavaPlainExpertsWithBias(StackedExperts):
    """Up and down with biases: Phi, GPT-NeoX, StarCoder2, ..."""

    has_gate = False
    has_bias = True


EXPERTS_CLASSES = {
    (cls.has_gate, cls.has_bias): cls
    for cls in (MoeLlavaGatedExperts, MoeLlavaGatedExpertsWithBias, MoeLlavaPlainExperts, MoeLlavaPlainExpertsWithBias)
}


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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` → `(..., D)`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights).reshape(hidden_states.shape)
        if self.use_residual:
            share = torch.softmax(self.residual_gate(hidden_states).float(), dim=-1).to(output.dtype)
            output = output * share[..., :1] + self.residual_mlp(hidden_states) * share[..., 1:]
        return output
