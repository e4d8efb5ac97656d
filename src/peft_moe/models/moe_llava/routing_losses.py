"""Load-balancing loss and z-loss of the routers of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    *,
    top_k: int,
    loss_type: str = "switch",
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the experts are used.

    With `f` the share of tokens that chose an expert (no gradient), `P` the mean probability of an expert:

    | `loss_type` | formula | value when balanced | source |
    |---|---|---|---|
    | `"switch"` | mean over layers of `E · Σ_e f_e P_e`, f from the K best | K | Switch Transformer, eq. 4, per layer |
    | `"pooled"` | `E · Σ_e f_e P_e`, f and P over all layers | K | transformers' `load_balancing_loss_func` |
    | `"moe_llava"` | sum over layers of `E · Σ_e f_e P_e`, f from the best | number of layers | MoE-LLaVA, eq. 8 and released code |

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
