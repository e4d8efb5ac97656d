"""Expert capacity: which choices an overfull expert drops. Only for parity with the original; the default drops nothing."""

from __future__ import annotations

import torch


def expert_capacity(
    num_tokens: torch.Tensor, *, num_experts: int, top_k: int, factor: float, minimum: int
) -> torch.Tensor:
    """How many choices one expert accepts: `max(minimum, ceil(K · factor · T / E))` (DeepSpeed 0.9.5, top-2 gate).

    Args:
        num_tokens (`torch.Tensor`, scalar):
            Tokens of the batch that are not padding (T). A tensor, so that the host need not wait for it.
    """
    wanted = num_tokens.to(torch.float32) * (factor * top_k / num_experts)
    # a product that should be whole may come out a hair above it
    return torch.ceil(wanted - 1e-4).clamp(min=minimum)


def within_capacity(
    top_k_index: torch.Tensor,
    capacity: torch.Tensor,
    *,
    num_experts: int,
    priority: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which choices find a place: experts fill up with first choices, then with second choices, and so on.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64):
            The chosen experts of each token, best first.
        capacity (`torch.Tensor`, scalar):
            Places per expert.
        priority (`torch.Tensor` of shape `(T,)`, *optional*):
            Tokens with a higher value come first (V-MoE's batch priority routing, https://huggingface.co/papers/2106.05974,
            algorithm 2). By default tokens come in the order of the batch.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*):
            False for padding, which takes no place and is never dropped.

    Returns:
        `torch.Tensor` of shape `(T, K)`, bool.
    """
    order = None if priority is None else torch.argsort(priority, descending=True, stable=True)
    index = top_k_index if order is None else top_k_index[order]
    chosen = torch.nn.functional.one_hot(index.transpose(0, 1), num_experts)
    if token_mask is not None:
        token_mask = token_mask.to(torch.bool)
        counted = token_mask if order is None else token_mask[order]
        chosen = chosen * counted.view(1, -1, 1)
    places_taken = chosen.flatten(0, 1).cumsum(dim=0).view_as(chosen)
    place = places_taken.gather(-1, index.transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    if order is not None:
        place = torch.empty_like(place).index_copy_(0, order, place)
    kept = place <= capacity
    return kept if token_mask is None else kept | ~token_mask.unsqueeze(-1)
