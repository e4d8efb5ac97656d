"""Load balancing and z-loss: pure functions on what routers decided.

A loss is a function of per-router *statistics*, sums over tokens. Sums are small, can be kept for a whole forward
pass, and give the gradient of any of these losses in two steps: from the loss to the sums (once), from the sums to the
logits of one router (when that router's backward runs). The injected gradient relies on this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..routing_recorder import RoutingStatistics


AUX_LOSS_TYPES = ("switch", "pooled", "mole")


def load_balancing_loss(statistics: Sequence[RoutingStatistics], *, loss_type: str = "switch") -> torch.Tensor:
    """How unevenly the experts are used, given the statistics of every router of one forward pass.

    With `f` the share of tokens that chose an expert (no gradient, sums to K) and `P` the mean probability:

    | `loss_type` | formula | value when balanced | source |
    |---|---|---|---|
    | `"switch"` | mean over routers of `E · Σ_e f_e P_e` | K | Switch Transformer, eq. 4, per layer |
    | `"pooled"` | `E · Σ_e f_e P_e` with f, P over all routers | K | transformers' `load_balancing_loss_func` |
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
    return RoutingStatistics(*(torch.stack(parts).sum(dim=0) for parts in zip(*statistics, strict=True)))
