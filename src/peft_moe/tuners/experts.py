"""Parameters of LoRA experts, stacked so that all experts of a linear are one tensor."""

from __future__ import annotations

import math

import torch
from torch import nn


class StackedWeight(nn.Module):
    """One weight per expert, `(E, R, features)`: the down or the up projections of all experts of a linear.

    Every expert is a slice of one parameter, so each rank of a distributed run takes part in every expert's gradient
    even if it routed no token there. The rank comes first in both projections, which makes `weight.view(E · R, …)` the
    matrix of all experts side by side.
    """

    def __init__(self, num_experts: int, rank: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, rank, features))

    def forward(self) -> torch.Tensor:
        """Return the weight. Called as a module so that sharded training gathers it first."""
        return self.weight

    def reset_kaiming_uniform(self) -> None:
        """Uniform in ±1/√features for each expert, the default of `nn.Linear` and of LoRA's A."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Shape, as `nn.Linear` shows it."""
        num_experts, rank, features = self.weight.shape
        return f"num_experts={num_experts}, rank={rank}, features={features}"
