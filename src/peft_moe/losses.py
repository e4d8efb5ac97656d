"""Load balancing and z-loss: pure functions on what routers decided.

A loss is a function of per-router *statistics*, sums over tokens. Sums are small, can be kept for a whole forward pass,
and give the gradient of any of these losses in two steps: from the loss to the sums (once), from the sums to the
logits of one router (when that router's backward runs). `aux_loss.py` relies on this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


AUX_LOSS_TYPES = ("switch", "pooled", "mole")


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over the tokens that one router saw in one forward pass, per sample.

    Args:
        expert_counts (`torch.Tensor` of shape `(B, E)`, float32, without gradient):
            How often each expert was among the chosen ones.
        probability_sums (`torch.Tensor` of shape `(B, E)`, float32):
            Sum of the softmax probabilities.
        squared_logsumexp_sums (`torch.Tensor` of shape `(B,)`, float32):
            Sum of `logsumexp(logits)²`.
        num_tokens (`torch.Tensor` of shape `(B,)`, float32, without gradient):
            Number of tokens that are not padding.
    """

    expert_counts: torch.Tensor
    probability_sums: torch.Tensor
    squared_logsumexp_sums: torch.Tensor
    num_tokens: torch.Tensor

    def to(self, device: torch.device) -> RoutingStatistics:
        """The same on another device, for routers of a model that is spread over several."""
        if self.num_tokens.device == device:
            return self
        return RoutingStatistics(
            self.expert_counts.to(device),
            self.probability_sums.to(device),
            self.squared_logsumexp_sums.to(device),
            self.num_tokens.to(device),
        )


def routing_statistics(
    router_logits: torch.Tensor, top_k_index: torch.Tensor, token_mask: torch.Tensor | None = None
) -> RoutingStatistics:
    """Sum up what a router decided; differentiable in `router_logits`.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`, float32)
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64)
        token_mask (`torch.Tensor` of shape `(B, S)` with `B · S = T`, *optional*):
            1 for tokens that count and 0 for padding. Its first axis says which tokens belong to one sample; without
            a mask the whole batch is one sample.
    """
    num_experts = router_logits.shape[-1]
    if token_mask is None:
        token_mask = router_logits.new_ones(1, router_logits.shape[0])
    mask = token_mask.to(device=router_logits.device, dtype=torch.float32)
    num_samples, num_positions = mask.shape
    logits = router_logits.float()
    probabilities = torch.softmax(logits, dim=-1).view(num_samples, num_positions, num_experts)
    squared_logsumexp = torch.logsumexp(logits, dim=-1).square().view(num_samples, num_positions)
    with torch.no_grad():
        index = top_k_index.reshape(num_samples, -1)
        weight = mask.unsqueeze(-1).expand(-1, -1, top_k_index.shape[-1]).reshape(num_samples, -1)
        expert_counts = torch.zeros(num_samples, num_experts, device=mask.device).scatter_add_(1, index, weight)
    return RoutingStatistics(
        expert_counts=expert_counts,
        # no einsum: autocast would compute it, and so store the gradient, in half precision
        probability_sums=(mask.unsqueeze(-1) * probabilities).sum(dim=1),
        squared_logsumexp_sums=(mask * squared_logsumexp).sum(dim=-1),
        num_tokens=mask.sum(dim=-1),
    )


def load_balancing_loss(statistics: Sequence[RoutingStatistics], *, loss_type: str = "switch") -> torch.Tensor:
    """How unevenly the experts are used, given the statistics of every router of one forward pass.

    With `f` the share of tokens that chose an expert (no gradient, sums to K) and `P` the mean probability:

    | `loss_type` | formula | value when balanced | source |
    |---|---|---|---|
    | `"switch"` | mean over routers of `E · Σ_e f_e P_e` | K | Switch Transformer, eq. 4, per layer; conventions of transformers |
    | `"pooled"` | `E · Σ_e f_e P_e` with f, P over all routers | K | transformers' `load_balancing_loss_func`, to the letter |
    | `"mole"` | mean over samples of `Σ_e f_e P_e`, f and P over all routers | K / E | LLaVA-MoLE, released code |

    The pooled forms allow a router to use a single expert as long as another one makes up for it; `"switch"` does not.

    Args:
        statistics (`Sequence[RoutingStatistics]`):
            One entry per router. The pooled forms need the same number of experts everywhere, `"mole"` also the same
            samples.
        loss_type (`str`):
            One of the rows above.

    Returns:
        `torch.Tensor`: a scalar, 0 where every token is padding.

    Raises:
        ValueError: unknown `loss_type`, or routers that cannot be pooled.
    """
    if loss_type not in AUX_LOSS_TYPES:
        raise ValueError(f"Unknown load-balancing loss {loss_type!r}. Choose one of {', '.join(AUX_LOSS_TYPES)}.")
    statistics = _on_one_device(statistics)
    if loss_type == "switch":
        return torch.stack([_switch_loss(entry) for entry in statistics]).mean()
    num_experts = {entry.expert_counts.shape[-1] for entry in statistics}
    if len(num_experts) > 1:
        raise ValueError(
            f"The load-balancing loss {loss_type!r} pools all routers, but they have {sorted(num_experts)} experts. "
            "Use 'switch', which treats each router by itself, or the same number of experts in every layer."
        )
    pooled = _add_up(statistics)
    if loss_type == "pooled":
        return _switch_loss(pooled)
    num_tokens = pooled.num_tokens.clamp(min=1).unsqueeze(-1)
    return (pooled.expert_counts / num_tokens * (pooled.probability_sums / num_tokens)).sum(dim=-1).mean()


def router_z_loss(statistics: Sequence[RoutingStatistics]) -> torch.Tensor:
    """Mean over routers of the mean over tokens of `logsumexp(logits)²`, which keeps logits small (ST-MoE, eq. 5)."""
    means = [
        entry.squared_logsumexp_sums.sum() / entry.num_tokens.sum().clamp(min=1)
        for entry in _on_one_device(statistics)
    ]
    return torch.stack(means).mean()


def _on_one_device(statistics: Sequence[RoutingStatistics]) -> list[RoutingStatistics]:
    return [entry.to(statistics[0].num_tokens.device) for entry in statistics]


def _switch_loss(entry: RoutingStatistics) -> torch.Tensor:
    num_tokens = entry.num_tokens.sum().clamp(min=1)
    share = entry.expert_counts.sum(dim=0) / num_tokens
    probability = entry.probability_sums.sum(dim=0) / num_tokens
    return share.shape[0] * (share * probability).sum()


def _add_up(statistics: Sequence[RoutingStatistics]) -> RoutingStatistics:
    samples = {entry.num_tokens.shape[0] for entry in statistics}
    if len(samples) > 1:
        raise ValueError(
            f"Routers saw {sorted(samples)} samples in one forward pass, so their statistics cannot be pooled per "
            "sample. Use the load-balancing loss 'switch'."
        )
    return RoutingStatistics(
        expert_counts=torch.stack([entry.expert_counts for entry in statistics]).sum(dim=0),
        probability_sums=torch.stack([entry.probability_sums for entry in statistics]).sum(dim=0),
        squared_logsumexp_sums=torch.stack([entry.squared_logsumexp_sums for entry in statistics]).sum(dim=0),
        num_tokens=torch.stack([entry.num_tokens for entry in statistics]).sum(dim=0),
    )
