"""Calibration: corrects the weights of the experts that a router has chosen, in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ...foreign_moe import MoeBlock, Routing, base_of, num_groups, probe, returns_probabilities
from ...routing.float32 import Float32Module


INIT_STD = 0.02
SMALLEST = 1e-9


@dataclass(frozen=True)
class Scoring:
    """How a router makes weights of logits, as measured.

    Args:
        is_sigmoid (`bool`): weights are proportional to the sigmoid of the logits, not to their softmax.
        is_normalized (`bool`): their sum is the same for every token.
        is_single (`bool`): one expert is chosen for each token.
    """

    is_sigmoid: bool
    is_normalized: bool
    is_single: bool = False

    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """`(T, E)` → `(T, E)`, float32."""
        logits = router_logits.float()
        return torch.sigmoid(logits) if self.is_sigmoid else torch.softmax(logits, dim=-1)


def measure_scoring(router: nn.Module, block: MoeBlock) -> Scoring | None:
    """Run a router on random numbers and compare; `None` if its weights follow neither softmax nor sigmoid."""
    routing = probe(router, block, num_groups(router), is_random=True)
    if isinstance(routing, str):
        return None
    if returns_probabilities(router, block):
        logits = routing.router_logits.clamp(min=torch.finfo(torch.float32).tiny).log()
        routing = replace(routing, router_logits=logits)
    total = routing.top_k_weights.float().sum(dim=-1)
    is_single = routing.top_k_index.shape[-1] == 1
    is_normalized = bool(torch.allclose(total, total.mean().expand_as(total), rtol=1e-4))
    for is_sigmoid in (False, True):
        scoring = Scoring(is_sigmoid, is_normalized, is_single)
        ratio = routing.top_k_weights.float() / scoring.probabilities(routing.router_logits).gather(
            -1, routing.top_k_index
        )
        expected = ratio[:, :1] if is_normalized else ratio[:1, :1]
        if torch.allclose(ratio, expected.expand_as(ratio), rtol=1e-3):
            return scoring
    return None


def warn_of_fixed_weights(model: nn.Module, blocks: Iterable[MoeBlock]) -> None:
    """Warn of routers that give their only chosen expert a fixed weight, which `"released_code"` cannot change."""
    fixed = []
    for block in blocks:
        scoring = measure_scoring(base_of(model.get_submodule(block.router)), block)
        if scoring is not None and scoring.is_single and scoring.is_normalized:
            fixed.append(block.layer)
    if fixed:
        warnings.warn(
            f"calibration='released_code' shares out a fixed sum of weights among the chosen experts, but the routers of layers "
            f"{fixed} choose one expert per token, so it changes nothing there and does not train. Use calibration='paper' or "
            "None.",
            stacklevel=2,
        )


class Calibration(Float32Module):
    """`W_out GELU(W_in z)` without biases; `W_out` begins as 0, so that nothing is corrected.

    Args:
        form (`"released_code"` or `"paper"`): what is done with it, see [`forward`].
        scoring (`Scoring`, *optional*): of the router; needed by `"released_code"`.
        in_features (`int`): E for `"released_code"`, D for `"paper"`.
        calibration_dim (`int`): width inside.
        num_experts (`int`): old and new ones (E).
    """

    def __init__(
        self, form: str, scoring: Scoring | None, *, in_features: int, calibration_dim: int, num_experts: int
    ) -> None:
        super().__init__()
        self.form = form
        self.scoring = scoring
        self.in_weight = nn.Parameter(torch.empty(calibration_dim, in_features, dtype=torch.float32))
        self.out_weight = nn.Parameter(torch.zeros(num_experts, calibration_dim, dtype=torch.float32))
        if not self.in_weight.is_meta:
            nn.init.normal_(self.in_weight, std=INIT_STD)

    @property
    def is_identity(self) -> bool:
        """Whether it corrects nothing."""
        return not bool(self.out_weight.any())

    def forward(self, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The corrected weights.

        `"paper"`, eq. 10: `w_e · (1 + MLP(x)_e)`. `"released_code"`: `q = p + MLP(p)`, at least 1e-9; where the router
        normalises its weights, `q / Σ q` over the chosen experts, times the sum that the router gives; elsewhere
        `w_e · q_e / p_e`.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`): input of the router.
            routing (`Routing`): its decision.

        Returns:
            `torch.Tensor` of shape `(T, K)`, in the dtype of the router's weights.
        """
        index, weights = routing.top_k_index, routing.top_k_weights.float()
        with torch.autocast(device_type=weights.device.type, enabled=False):
            if self.form == "paper":
                x = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
                corrected = weights * (1 + self._mlp(x).gather(-1, index))
            else:
                assert self.scoring is not None
                p = self.scoring.probabilities(routing.router_logits)
                q = (p + self._mlp(p)).clamp(min=SMALLEST).gather(-1, index)
                if self.scoring.is_normalized:
                    corrected = weights.detach().sum(dim=-1, keepdim=True) * q / q.sum(dim=-1, keepdim=True)
                else:
                    corrected = weights * q / p.gather(-1, index).clamp(min=SMALLEST)
        return corrected.to(routing.top_k_weights.dtype)

    def _mlp(self, z: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(z, self.in_weight)), self.out_weight)
