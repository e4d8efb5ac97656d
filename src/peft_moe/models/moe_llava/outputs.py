"""What the models return: the outputs of LLaVA and what the routers said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast


@dataclass
class MoeLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """Output of [`MoeLlavaModel`]: that of [`~transformers.LlavaModel`] and what the routers said.

    Args:
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One float32 tensor of shape `(batch_size * sequence_length, num_experts)` per mixture.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Output of [`MoeLlavaForConditionalGeneration`]: that of LLaVA and what the routers said.

    Args:
        aux_loss (`torch.Tensor`, *optional*):
            The load-balancing loss, not yet multiplied by its coefficient; `loss` contains it already.
        z_loss (`torch.Tensor`, *optional*, returned with `router_z_loss_coef > 0`):
            The router z-loss, likewise.
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One float32 tensor of shape `(batch_size * sequence_length, num_experts)` per mixture.
    """

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
