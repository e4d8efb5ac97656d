"""Who goes where: the router of a mixture, what an overfull expert drops, and the losses that balance routers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

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
        """Follow the model to another device and a wider dtype, but stay float32 where it is cast to half."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize >= min(tensor.dtype.itemsize, torch.float32.itemsize):
                return moved
            return tensor.to(moved.device, torch.float32)

        return super()._apply(keep_dtype, recurse)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route the tokens `(T, D)`, of any float dtype.

        Returns:
            `router_logits` `(T, E)` float32, `top_k_weights` `(T, K)` float32 and `top_k_index` `(T, K)` int64, in the
            order of the routers of transformers.
        """
        router_logits = self._logits(hidden_states)
        probabilities = torch.softmax(router_logits, dim=-1)
        top_k_index = self._choose(router_logits)
        weights = probabilities.gather(-1, top_k_index)
        kept = None if self.drop is None else self._kept(weights, top_k_index)
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

    def _kept(self, weights: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        capacity = expert_capacity(
            top_k_index.shape[0],
            num_experts=self.num_experts,
            top_k=self.top_k,
            factor=self.capacity_factor if self.training else self.eval_capacity_factor,
            minimum=self.min_capacity,
        )
        priority = weights.detach()[:, 0] if self.drop == "probability" else None
        return within_capacity(top_k_index, capacity, num_experts=self.num_experts, priority=priority)

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


def expert_capacity(num_tokens: int, *, num_experts: int, top_k: int, factor: float, minimum: int) -> int:
    """How many choices one expert accepts: `max(minimum, ceil(K · factor · T / E))` (DeepSpeed 0.9.5, top-2 gate).

    T counts padding, as it does there.
    """
    # a product that should be whole may come out a hair above it
    return max(minimum, math.ceil(num_tokens * (factor * top_k / num_experts) - 1e-4))


def within_capacity(
    top_k_index: torch.Tensor, capacity: int, *, num_experts: int, priority: torch.Tensor | None = None
) -> torch.Tensor:
    """Which choices find a place: experts fill up with first choices, then with second choices, and so on.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64):
            The chosen experts of each token, best first.
        capacity (`int`):
            Places per expert.
        priority (`torch.Tensor` of shape `(T,)`, *optional*):
            Tokens with a higher value come first (V-MoE's batch priority routing,
            https://huggingface.co/papers/2106.05974, algorithm 2). By default tokens come in the order of the batch.

    Returns:
        `torch.Tensor` of shape `(T, K)`, bool.
    """
    order = None if priority is None else torch.argsort(priority, descending=True, stable=True)
    index = top_k_index if order is None else top_k_index[order]
    chosen = F.one_hot(index.transpose(0, 1), num_experts)
    places_taken = chosen.flatten(0, 1).cumsum(dim=0).view_as(chosen)
    place = places_taken.gather(-1, index.transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    if order is not None:
        place = torch.empty_like(place).index_copy_(0, order, place)
    return place <= capacity


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    *,
    top_k: int,
    loss_type: str = "switch",
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the experts are used.

    With `f` the share of tokens that chose an expert (no gradient), `P` the mean probability of an expert, and
    `b = E · Σ_e f_e P_e`:

    | `loss_type` | formula | value when balanced | source |
    |---|---|---|---|
    | `"switch"` | mean over layers of `b`, f from the K best | K | Switch Transformer, eq. 4, per layer |
    | `"pooled"` | `b`, f and P over all layers | K | transformers' `load_balancing_loss_func` |
    | `"moe_llava"` | sum over layers of `b`, f from the best | number of layers | MoE-LLaVA, eq. 8, released code |

    The choices are read from the logits, before a limited capacity drops any and without Gumbel noise.

    Args:
        router_logits (`Sequence[torch.Tensor]`):
            One of shape `(T, E)` per layer.
        top_k (`int`):
            Experts per token (K).
        token_mask (`torch.Tensor` of shape `(B, S)` with `B · S = T`, *optional*):
            0 for padding, which is not counted.

    Returns:
        `torch.Tensor`: a float32 scalar, 0 where every token is padding.
    """
    num_counted = 1 if loss_type == "moe_llava" else top_k
    sums = [_sums(logits, num_counted, token_mask) for logits in router_logits]
    device = router_logits[0].device
    if loss_type == "pooled":
        counts, probabilities, num_tokens = (torch.stack([part.to(device) for part in parts]) for parts in zip(*sums))
        return _balance(counts.sum(0), probabilities.sum(0), num_tokens.sum())
    losses = torch.stack([_balance(*layer).to(device) for layer in sums])
    return losses.sum() if loss_type == "moe_llava" else losses.mean()


def router_z_loss(router_logits: Sequence[torch.Tensor], *, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over layers of the mean over tokens of `logsumexp(logits)²`, which keeps logits small (ST-MoE, eq. 5)."""
    losses = []
    for logits in router_logits:
        weight = _weight(logits, token_mask)
        squares = torch.logsumexp(logits.float(), dim=-1).square()
        losses.append((weight * squares).sum() / weight.sum().clamp(min=1))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _weight(logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    if token_mask is None:
        return torch.ones(logits.shape[0], device=logits.device)
    return token_mask.reshape(-1).to(device=logits.device, dtype=torch.float32)


def _sums(
    logits: torch.Tensor, num_counted: int, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = _weight(logits, token_mask)
    probabilities = F.softmax(logits.float(), dim=-1)
    index = torch.topk(logits, num_counted, dim=-1).indices
    counts = torch.zeros(logits.shape[-1], device=logits.device)
    counts = counts.scatter_add(0, index.reshape(-1), weight.repeat_interleave(num_counted))
    return counts, (weight.unsqueeze(-1) * probabilities).sum(dim=0), weight.sum()


def _balance(counts: torch.Tensor, probabilities: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    num_tokens = num_tokens.clamp(min=1)
    return counts.shape[0] * (counts / num_tokens * (probabilities / num_tokens)).sum()
