"""Token-choice top-k routing: each token goes to the experts that score highest for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .float32 import Float32Module
from .router_output import RouterOutput


GATE_SCALES = ("none", "straight_through", "prob")


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


class TopKRouter(Float32Module):
    """A linear router with softmax over all experts (LLaVA-MoLE, section 3.2: `p = softmax(R x)`).

    Parameters and arithmetic are float32 whatever the dtype of the model.

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
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.top_k = num_experts if soft else top_k
        self.gate_scale = "prob" if soft else gate_scale
        self.soft = soft
        self.normalize_top_k = normalize_top_k
        self.jitter_noise = jitter_noise
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does: uniform in ±1/√D (the released code's default)."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

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
