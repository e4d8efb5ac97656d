"""The router of a mixture: scores experts for each token, in float32, and weighs the chosen ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .capacity import expert_capacity, within_capacity
from .configuration_moe_llava import MoeLlavaConfig


class MoeLlavaTopKRouter(nn.Module):
    """A linear router with softmax over all experts (MoE-LLaVA, eq. 5 and 6).

    Its weight and its arithmetic are float32 in a model of half precision. Which expert a token visits depends in
    evaluation on the token alone; noise exists in training only, and only where the configuration asks for it.

    Args:
        config (`MoeLlavaConfig`): routing options.
        hidden_size (`int`): width of the hidden states (D).
        num_experts (`int`): number of experts (E).
    """

    def __init__(self, config: MoeLlavaConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_size
        self.num_experts = num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.samples_second_expert = config.router_second_expert == "gumbel"
        self.jitter_noise = config.router_jitter_noise
        self.drop = config.router_drop
        self.capacity_factor = config.router_capacity_factor
        self.eval_capacity_factor = config.router_eval_capacity_factor
        self.min_capacity = config.router_min_capacity
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does, uniform in ±1/√D (released code)."""
        bound = 1 / math.sqrt(self.hidden_dim)
        init.uniform_(self.weight, -bound, bound)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoeLlavaTopKRouter:
        """Follow the model to another device and to a wider dtype, but stay float32 where it is cast to half precision."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize >= min(tensor.dtype.itemsize, torch.float32.itemsize):
                return moved
            return tensor.to(moved.device, torch.float32)

        return super()._apply(keep_dtype, recurse)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`, any float dtype)
            token_mask (`torch.Tensor` of shape `(T,)`, *optional*):
                0 for padding. Only a limited capacity looks at it.

        Returns:
            `router_logits` `(T, E)` float32, `top_k_weights` `(T, K)` float32 and `top_k_index` `(T, K)` int64, in the
            order of the routers of transformers.
        """
        router_logits = self._logits(hidden_states)
        probabilities = torch.softmax(router_logits, dim=-1)
        top_k_index = self._choose(router_logits)
        weights = probabilities.gather(-1, top_k_index)
        kept = None if self.drop is None else self._kept(weights, top_k_index, token_mask)
        return router_logits, self._normalize(weights, kept), top_k_index

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            hidden_states = hidden_states.to(dtype)
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                hidden_states = hidden_states * noise
            return F.linear(hidden_states, self.weight.to(dtype))

    def _choose(self, router_logits: torch.Tensor) -> torch.Tensor:
        """The chosen experts `(T, K)`, best first; a sampled second expert is never the first."""
        if not (self.training and self.samples_second_expert):
            return torch.topk(router_logits, self.top_k, dim=-1).indices
        first = router_logits.argmax(dim=-1, keepdim=True)
        gumbel = -torch.empty_like(router_logits).exponential_().log()
        second = (router_logits.detach() + gumbel).scatter(-1, first, float("-inf")).argmax(dim=-1, keepdim=True)
        return torch.cat([first, second], dim=-1)

    def _kept(self, weights: torch.Tensor, top_k_index: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        if token_mask is None:
            num_tokens = torch.tensor(top_k_index.shape[0], device=top_k_index.device)
        else:
            num_tokens = token_mask.sum()
        capacity = expert_capacity(
            num_tokens,
            num_experts=self.num_experts,
            top_k=self.top_k,
            factor=self.capacity_factor if self.training else self.eval_capacity_factor,
            minimum=self.min_capacity,
        )
        return within_capacity(
            top_k_index,
            capacity,
            num_experts=self.num_experts,
            priority=weights.detach()[:, 0] if self.drop == "probability" else None,
            token_mask=token_mask,
        )

    def _normalize(self, weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if self.norm_topk_prob and self.top_k == 1:
            weights = weights / weights.detach()
        if kept is not None:
            weights = weights * kept
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        return weights

    def extra_repr(self) -> str:
        """The settings that decide where a token goes."""
        return f"hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}, drop={self.drop!r}"
