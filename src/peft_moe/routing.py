"""WHO goes where: routers turn hidden states, or the cluster of an example, into a `RouterOutput`.

[`RouterOutput`] is what every router hands to the dispatch plan, the kernels and the recorder. [`TopKRouter`] routes
each token to the experts that score highest for it; [`ClusterRouter`] routes whole examples by the cluster that their
instruction belongs to (MoCLE).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


__all__ = [
    "ClusterCentroids",
    "ClusterEmbedding",
    "ClusterRouter",
    "RouterOutput",
    "TopKRouter",
    "top_k_weights",
]

GATE_SCALES = ("none", "straight_through", "prob")


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
            The choices that load balancing counts, where that is not `top_k_index`: a dense mixture visits every
            expert, and counts the best one; a universal expert does not count.
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


class Float32Module(nn.Module):
    """Follows the model to another device, but keeps its dtype where the model is cast to half precision.

    A rounded logit can change the choice of an expert, and a bfloat16 softmax ties often.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]


def top_k_weights(log_probabilities: torch.Tensor, *, gate_scale: str, normalize: bool) -> torch.Tensor | None:
    """Turn the log-probabilities of the chosen experts into the weights of their outputs.

    | `gate_scale` | value | gradient to the router from the task loss |
    |---|---|---|
    | `"none"` | 1 | none (LLaVA-MoLE, paper and released sparse path) |
    | `"straight_through"` | exactly 1 | that of log p, i.e. of `p / p.detach()` |
    | `"prob"` | p | that of p (Switch Transformer, eq. 2) |

    Args:
        log_probabilities (`torch.Tensor` of shape `(T, K)`, float32):
            Log-softmax over *all* experts, gathered at the chosen ones.
        gate_scale (`str`):
            One of the rows above.
        normalize (`bool`):
            Divide p by its sum over the K chosen experts first (Mixtral). Ignored for K = 1, where it would make the
            weight the constant 1.

    Returns:
        `torch.Tensor` of shape `(T, K)` or `None` where every weight is 1 without gradient.
    """
    if gate_scale == "none":
        return None
    if normalize and log_probabilities.shape[-1] > 1:
        log_probabilities = torch.log_softmax(log_probabilities, dim=-1)
    if gate_scale == "straight_through":
        log_probabilities = log_probabilities - log_probabilities.detach()
    return torch.exp(log_probabilities)


class LinearRouter(Float32Module):
    """Scores by a linear layer in float32, initialised as `nn.Linear` is: uniform in ±1/√D.

    Args:
        in_features (`int`), num_experts (`int`): shape of `weight`, `(E, D)`.
        bias (`bool`): whether there is a bias `(E,)`.
    """

    def __init__(self, in_features: int, num_experts: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class TopKRouter(LinearRouter):
    """A linear router with softmax over all experts (LLaVA-MoLE, section 3.2: `p = softmax(R x)`).

    Parameters, which start as the released code's do, and arithmetic are float32 whatever the dtype of the model.

    Args:
        in_features (`int`):
            Width of the hidden states (D).
        num_experts (`int`):
            Number of experts (E).
        top_k (`int`):
            Experts per token (K), at most `num_experts`.
        bias (`bool`):
            Whether the linear layer has a bias (the released code has one).
        gate_scale (`str`):
            See [`top_k_weights`].
        soft (`bool`):
            Use every expert with weight p, a dense mixture (the released inference). `top_k` and `gate_scale` are
            then ignored.
        normalize_top_k (`bool`):
            See [`top_k_weights`].
        jitter_noise (`float`):
            In training, multiply the router's input by a uniform draw from `[1 - jitter_noise, 1 + jitter_noise]`
            (Switch Transformer, appendix F).
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int = 1,
        bias: bool = True,
        gate_scale: str = "straight_through",
        soft: bool = False,
        normalize_top_k: bool = True,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, bias=bias)
        self.top_k = num_experts if soft else top_k
        self.gate_scale = "prob" if soft else gate_scale
        self.soft = soft
        self.normalize_top_k = normalize_top_k
        self.jitter_noise = jitter_noise

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Score every expert for every token: `(T, D)` of any float dtype → `(T, E)` float32."""
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                hidden_states = hidden_states * noise
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden_states, self.weight.float(), bias)

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route `(T, D)` hidden states of any float dtype."""
        router_logits = self.logits(hidden_states)
        if self.soft:
            index = torch.arange(self.num_experts, device=router_logits.device).expand(router_logits.shape)
            best = router_logits.argmax(dim=-1, keepdim=True)
            return RouterOutput(router_logits, index, torch.softmax(router_logits, dim=-1), balance_index=best)
        # softmax is monotonic: the choice can be made on logits, and mode "none" never needs probabilities
        top_logits, top_k_index = torch.topk(router_logits, self.top_k, dim=-1)
        if self.gate_scale == "none" or (self.gate_scale == "straight_through" and not router_logits.requires_grad):
            return RouterOutput(router_logits, top_k_index, None)
        chosen = top_logits - torch.logsumexp(router_logits, dim=-1, keepdim=True)
        weights = top_k_weights(chosen, gate_scale=self.gate_scale, normalize=self.normalize_top_k)
        return RouterOutput(router_logits, top_k_index, weights)

    def extra_repr(self) -> str:
        """The settings that decide where a token goes."""
        return (
            f"in_features={self.in_features}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"gate_scale={self.gate_scale!r}, soft={self.soft}, bias={self.bias is not None}"
        )


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


class ClusterRouter(LinearRouter):
    """Turns the embedding of a cluster into the expert of an example and the weights of its experts.

    With `G = softmax((W c + ε) / τ)` over the E experts and `G_max` its largest entry (MoCLE, equations of section
    3.2; https://huggingface.co/papers/2312.12379):

    | expert | weight | with `squared_gate` (released code) |
    |---|---|---|
    | the `top_k` best ones | `G_e` | `G_e · G_max`; `G_e` without a universal expert |
    | the universal one | `1 - G_max` | `1 - G_max` |

    The released code multiplies by the gate, and where there is a universal expert again by the largest gate. Neither
    normalises over the chosen experts.
    Parameters and arithmetic are float32 (released code: a float16 softmax, in which `G_max` is often exactly 1 and
    the universal expert off).

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
        super().__init__(embedding_dim, num_experts, bias=bias)
        self.embedding_dim = embedding_dim
        self.top_k = top_k
        self.temperature = temperature
        self.noise_std = noise_std
        self.squared_gate = squared_gate
        self.universal_expert = universal_expert

    @property
    def num_stacked(self) -> int:
        """Experts including the universal one."""
        return self.num_experts + self.universal_expert

    def forward(self, embeddings: torch.Tensor) -> RouterOutput:
        """Route B examples by the embeddings `(B, D)` of their clusters.

        Returns:
            `RouterOutput`: logits `(B, E)` (already divided by τ), index and weights `(B, K)`; with a universal expert
            it comes last in both, and `balance_index` leaves it out.
        """
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            logits = F.linear(embeddings.float(), self.weight, self.bias)
            if self.training and self.noise_std > 0:
                logits = logits + torch.randn_like(logits) * self.noise_std
            logits = logits / self.temperature
            gates, index = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
            if not self.universal_expert:
                return RouterOutput(logits, index, gates)
            largest = gates[:, :1]
            weights = gates * largest if self.squared_gate else gates
            universal = torch.full_like(index[:, :1], self.num_experts)
            weights = torch.cat([weights, 1 - largest], dim=-1)
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
