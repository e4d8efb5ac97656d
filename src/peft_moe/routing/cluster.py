"""Routing by cluster: the cluster that an instruction belongs to chooses the expert of the whole example (MoCLE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .float32 import Float32Module
from .router_output import RouterOutput


class ClusterCentroids(Float32Module):
    """The centroids of a k-means over sentence embeddings, saved with an adapter and never trained.

    Args:
        num_clusters (`int`), embedding_dim (`int`): shape of `weight`, `(C, D)`. Not a number until it is loaded.
    """

    weight: torch.Tensor

    def __init__(self, num_clusters: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((num_clusters, embedding_dim), math.nan, dtype=torch.float32))

    @property
    def are_known(self) -> bool:
        """Whether they have been set or loaded; offloaded ones count as loaded."""
        return self.weight.is_meta or bool(torch.isfinite(self.weight).all())


class ClusterEmbedding(Float32Module):
    """A trainable vector for each cluster.

    Args:
        num_clusters (`int`), embedding_dim (`int`): shape of `weight`, `(C, D)`.
    """

    def __init__(self, num_clusters: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_clusters, embedding_dim, dtype=torch.float32))

    def reset_parameters(self, *, std: float) -> None:
        """Draw from a normal distribution of this width."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=std)

    def forward(self, cluster_ids: torch.Tensor) -> torch.Tensor:
        """`(B,)` int64 → `(B, D)` float32."""
        return F.embedding(cluster_ids, self.weight)


class ClusterRouter(Float32Module):
    """Turns the embedding of a cluster into the expert of an example and the weights of its experts.

    With `G = softmax((W c + ε) / τ)` over the E experts and `G_max` its largest entry (MoCLE, equations of section 3.2;
    https://huggingface.co/papers/2312.12379):

    | expert | weight | with `squared_gate` (released code) |
    |---|---|---|
    | the `top_k` best ones | `G_e` | `G_e²` |
    | the universal one | `1 - G_max` | `1 - G_max` |

    The released code multiplies the expert's output by its gate twice. Neither normalises over the chosen experts.
    Parameters and arithmetic are float32 (released code: a float16 softmax, in which `G_max` is often exactly 1 and the
    universal expert off).

    Args:
        embedding_dim (`int`):
            Width of the cluster embeddings (D).
        num_experts (`int`):
            Experts to choose from (E), without the universal one.
        top_k (`int`):
            Experts per example, without the universal one.
        bias (`bool`):
            Whether the linear layer has a bias (the released code has one).
        temperature (`float`):
            τ. The smaller it is, the more an example specialises.
        noise_std (`float`):
            Standard deviation of ε, which is drawn per example and expert in training only.
        squared_gate (`bool`):
            See the table.
        universal_expert (`bool`):
            Whether there is a universal expert. It has the number E.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        bias: bool = False,
        temperature: float = 0.05,
        noise_std: float = 0.0,
        squared_gate: bool = False,
        universal_expert: bool = True,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.temperature = temperature
        self.noise_std = noise_std
        self.squared_gate = squared_gate
        self.universal_expert = universal_expert
        self.weight = nn.Parameter(torch.empty(num_experts, embedding_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does: uniform in ±1/√D."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.embedding_dim)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def num_stacked(self) -> int:
        """Experts including the universal one."""
        return self.num_experts + self.universal_expert

    def forward(self, embeddings: torch.Tensor) -> RouterOutput:
        """Route B examples by the embeddings `(B, D)` of their clusters.

        Returns:
            `RouterOutput`: logits `(B, E)` (already divided by τ), index and weights `(B, K)`; with a universal expert it
            comes last in both, and `balance_index` leaves it out.
        """
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            logits = F.linear(embeddings.float(), self.weight, self.bias)
            if self.training and self.noise_std > 0:
                logits = logits + torch.randn_like(logits) * self.noise_std
            logits = logits / self.temperature
            gates, index = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
            weights = gates.square() if self.squared_gate else gates
            if not self.universal_expert:
                return RouterOutput(logits, index, weights)
            universal = torch.full_like(index[:, :1], self.num_experts)
            weights = torch.cat([weights, 1 - gates[:, :1]], dim=-1)
            return RouterOutput(logits, torch.cat([index, universal], dim=-1), weights, balance_index=index)

    def universal_only(self, num_examples: int, device: torch.device) -> RouterOutput:
        """Examples of no known cluster: no expert, so `G_max = 0`, and the universal expert has weight 1."""
        logits = torch.zeros(num_examples, self.num_experts, device=device)
        index = torch.full((num_examples, 1), self.num_experts, dtype=torch.int64, device=device)
        return RouterOutput(logits, index, None, balance_index=index[:, :0])

    def extra_repr(self) -> str:
        """The settings that decide where an example goes."""
        return (
            f"embedding_dim={self.embedding_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"temperature={self.temperature}, noise_std={self.noise_std}, squared_gate={self.squared_gate}, "
            f"universal_expert={self.universal_expert}, bias={self.bias is not None}"
        )
