"""`RouterOutput`: what every router hands to the dispatch plan, the kernels and the recorder."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RouterOutput(NamedTuple):
    """The decision of one router for T tokens; for T examples, where examples are routed as a whole.

    A tuple, because FSDP and DeepSpeed find the tensors of a module's output in tuples and not in other objects. They
    gather the weights of the router for backward when the gradient of one of these tensors arrives.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`, float32):
            Unnormalised scores, one row per token.
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64):
            The chosen experts of each token, best first.
        top_k_weights (`torch.Tensor` of shape `(T, K)`, float32, or `None`):
            What the output of each chosen expert is multiplied with. `None` means that every weight is exactly 1 and
            carries no gradient.
        balance_index (`torch.Tensor` of shape `(T, K')`, int64, *optional*):
            The choices that load balancing counts, where that is not `top_k_index`: a dense mixture visits every expert,
            and counts the best one; a universal expert does not count.
    """

    router_logits: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor | None
    balance_index: torch.Tensor | None = None

    @property
    def counted_index(self) -> torch.Tensor:
        """The choices that load balancing counts: `(T, K)` or `(T, 1)`."""
        return self.top_k_index if self.balance_index is None else self.balance_index

    @property
    def num_experts(self) -> int:
        """Number of experts that this router can choose from (E)."""
        return self.router_logits.shape[-1]

    @property
    def top_k(self) -> int:
        """Number of experts that a token visits (K)."""
        return self.top_k_index.shape[-1]
