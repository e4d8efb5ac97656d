"""The gradient of the auxiliary loss: where it is injected, and how much each forward pass weighs in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..forward_context import ForwardPass
from ..routing_recorder import RoutingStatistics, routing_statistics, statistics_of
from .processes import num_processes, with_other_processes


AuxLossFunction = Callable[[list[RoutingStatistics]], torch.Tensor]


class AuxLossState:
    """What this package keeps of a forward pass: how much its loss weighs, and the gradient that this gives."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | float | None = None
        """gradient of the objective with respect to the mean loss of this pass; known once backward has begun"""
        self.is_claimed = False
        """whether the auxiliary loss reaches backward by another way than injection"""
        self.is_compiled = False
        """whether a router ran in a compiled graph, where nothing can be injected"""
        self.gradients: dict[str, dict[str, RoutingStatistics]] = {}
        """gradient of the auxiliary loss with respect to the statistics of each router, filled once"""
        self.elsewhere: dict[str, dict[str, RoutingStatistics]] = {}
        """what the other processes recorded, `(1, E)`, for adapters whose loss is over all of them"""


class PassWeight:
    """How much a forward pass weighs in the objective, given the gradient of one of its outputs: the table on top."""

    def __init__(
        self,
        *,
        label_share: torch.Tensor | float,
        label_mask: torch.Tensor | None,
        num_items: torch.Tensor | float | None,
        stated: torch.Tensor | float | None,
    ) -> None:
        self.label_share = label_share
        self.label_mask = label_mask
        self.num_items = num_items
        self.stated = stated

    def of(self, name: str, gradient: torch.Tensor) -> torch.Tensor | float:
        """`name` is that of the output, `gradient` has its shape."""
        if name == "loss":
            return gradient.sum() * self.label_share
        if self.stated is not None:
            return self.stated
        if name == "log_probs":
            return _scale_of_negative_log_likelihood(gradient, self.label_mask)
        if name == "logits" and self.num_items is not None:
            return gradient.ne(0).any(dim=-1).sum() * num_processes() / self.num_items
        return 1.0


def _scale_of_negative_log_likelihood(gradient: torch.Tensor, label_mask: torch.Tensor | None) -> torch.Tensor:
    """-Σ of the gradient over the labels if it is the same negative number everywhere, 0 without labels, else 1.

    Args:
        gradient (`torch.Tensor` of shape `(B, S)`): gradient of the log-probability of each label.
        label_mask (`torch.Tensor` of the same shape, *optional*): where there is a label; elsewhere the gradient means
            nothing.
    """
    is_label = gradient.ne(0) if label_mask is None else label_mask & gradient.ne(0)
    smallest = torch.where(is_label, gradient, torch.inf).min()
    largest = torch.where(is_label, gradient, -torch.inf).max()
    is_likelihood = (smallest == largest) & (smallest < 0)
    scale = torch.where(is_likelihood, -(gradient * is_label).sum(), 1.0)
    return torch.where(is_label.any(), scale, 0.0)


class UpstreamGradient:
    """Tensor hook on one output of the base model: tells the pass how much it weighs."""

    def __init__(self, name: str, forward_pass: ForwardPass, weight: PassWeight) -> None:
        self.name = name
        self.forward_pass = forward_pass
        self.weight = weight

    def __call__(self, gradient: torch.Tensor) -> None:
        state = self.forward_pass.state_of(AuxLossState)
        if self.name == "loss" or state.scale is None:
            state.scale = self.weight.of(self.name, gradient)


class GradientSource:
    """Knows the gradient of one adapter's auxiliary loss with respect to the statistics of one router."""

    def __init__(
        self, function: AuxLossFunction, forward_pass: ForwardPass, adapter_name: str, router_name: str
    ) -> None:
        self.function = function
        self.forward_pass = forward_pass
        self.adapter_name = adapter_name
        self.router_name = router_name

    @property
    def is_silent(self) -> bool:
        """Whether the auxiliary loss of this pass reaches backward by another way."""
        return self.forward_pass.state_of(AuxLossState).is_claimed

    def scaled(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for `probability_sums` `(B, E)` and `squared_logsumexp_sums` `(B,)`, times the pass's weight."""
        state = self.forward_pass.state_of(AuxLossState)
        if self.adapter_name not in state.gradients:
            state.gradients[self.adapter_name] = self._differentiate()
        scale = 1.0 if state.scale is None else state.scale
        if isinstance(scale, torch.Tensor):
            scale = scale.to(device)
        gradient = state.gradients[self.adapter_name][self.router_name]
        return gradient.probability_sums * scale, gradient.squared_logsumexp_sums * scale

    def _differentiate(self) -> dict[str, RoutingStatistics]:
        leaves = {
            name: entry._replace(
                probability_sums=entry.probability_sums.detach().requires_grad_(),
                squared_logsumexp_sums=entry.squared_logsumexp_sums.detach().requires_grad_(),
            )
            for name, entry in statistics_of(self.forward_pass)[self.adapter_name].items()
        }
        elsewhere = self.forward_pass.state_of(AuxLossState).elsewhere.get(self.adapter_name)
        inputs = [t for entry in leaves.values() for t in (entry.probability_sums, entry.squared_logsumexp_sums)]
        with torch.enable_grad():
            loss = self.function(with_other_processes(leaves, elsewhere))
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        return {
            name: entry._replace(probability_sums=probability, squared_logsumexp_sums=squared_logsumexp)
            for (name, entry), (probability, squared_logsumexp) in zip(leaves.items(), pairs, strict=True)
        }


class InjectAuxLoss(torch.autograd.Function):
    """Identity on the hidden states; in backward, a gradient for the router logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        token_mask: torch.Tensor,
        source: GradientSource,
    ) -> torch.Tensor:
        ctx.save_for_backward(router_logits, top_k_index)
        ctx.token_mask = token_mask
        ctx.source = source
        return hidden_states.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        router_logits, top_k_index = ctx.saved_tensors
        if ctx.source.is_silent:
            return gradient, torch.zeros_like(router_logits), None, None, None
        upstream = ctx.source.scaled(router_logits.device)
        with torch.enable_grad():
            leaf = router_logits.detach().requires_grad_()
            statistics = routing_statistics(leaf, top_k_index, ctx.token_mask)
            outputs = (statistics.probability_sums, statistics.squared_logsumexp_sums)
            (router_gradient,) = torch.autograd.grad(outputs, leaf, upstream)
        return gradient, router_gradient, None, None, None


class AttachAuxLoss(torch.autograd.Function):
    """Identity on an output; in backward, the weight of the pass becomes the gradient of the auxiliary loss."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: torch.Tensor, aux_loss: torch.Tensor, name: str, weight: PassWeight
    ) -> torch.Tensor:
        ctx.name, ctx.weight = name, weight
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight = torch.as_tensor(ctx.weight.of(ctx.name, gradient), dtype=torch.float32, device=gradient.device)
        return gradient, weight, None, None
