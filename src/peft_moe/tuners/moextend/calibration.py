"""Calibration: corrects the weights of the experts that a router has chosen, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...foreign_moe import Scoring
from ...routing import Float32Module, RouterOutput


INIT_STD = 0.02
SMALLEST = 1e-9


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

    def forward(self, hidden_states: torch.Tensor, decision: RouterOutput) -> torch.Tensor:
        """The corrected weights.

        `"paper"`, eq. 10: `w_e · (1 + MLP(x)_e)`. `"released_code"`: `q = p + MLP(p)`, at least 1e-9; where the router
        normalises its weights, `q / Σ q` over the chosen experts, times the sum that the router gives; elsewhere
        `w_e · q_e / p_e`.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`): input of the router.
            decision (`RouterOutput`): what it decided.

        Returns:
            `torch.Tensor` of shape `(T, K)`, in the dtype of the router's weights.
        """
        index, weights = decision.top_k_index, decision.top_k_weights.float()
        with torch.autocast(device_type=weights.device.type, enabled=False):
            if self.form == "paper":
                x = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
                corrected = weights * (1 + self._mlp(x).gather(-1, index))
            else:
                assert self.scoring is not None
                p = self.scoring.probabilities(decision.router_logits)
                q = (p + self._mlp(p)).clamp(min=SMALLEST).gather(-1, index)
                if self.scoring.is_normalized:
                    corrected = weights.detach().sum(dim=-1, keepdim=True) * q / q.sum(dim=-1, keepdim=True)
                else:
                    corrected = weights * q / p.gather(-1, index).clamp(min=SMALLEST)
        return corrected.to(decision.top_k_weights.dtype)

    def _mlp(self, z: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(z, self.in_weight)), self.out_weight)
