"""Rows for pads of a router that adds nothing for each expert: against the direction that all its inputs share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...foreign_moe import read_routing
from .padding import MergedRouter


logger = logging.getLogger(__name__)

GAP = 30.0
"""how far the logit of a pad lies below the smallest one that was chosen: at most 1e-13 of its probability"""
MAX_TOKENS = 16384
MIN_MARGIN = 1e-3
MAX_STEPS = 1000


class _Inputs:
    """Forward hook of a router: keeps what it read, and the smallest logit that it chose.

    Args:
        merged (`MergedRouter`): its tensors after merging.
    """

    def __init__(self, merged: MergedRouter) -> None:
        self.merged = merged
        self.weight = merged.weight.detach()[merged.places].float()  # as the router numbers experts before merging
        self.hidden_states: list[torch.Tensor] = []
        self.smallest: list[torch.Tensor] = []
        self.is_linear = True

    @property
    def num_tokens(self) -> int:
        """How many were kept."""
        return sum(len(entry) for entry in self.hidden_states)

    def __call__(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        routing = read_routing(output, self.merged.num_experts)
        room = MAX_TOKENS - self.num_tokens
        if isinstance(routing, str) or room <= 0:
            return
        x = args[0] if args else kwargs["hidden_states"]
        x = x.reshape(-1, x.shape[-1])[:room].detach()
        logits = F.linear(x.float(), self.weight)
        found = routing.router_logits.reshape(-1, logits.shape[-1])[:room].float()
        if bool((found >= 0).all()) and torch.allclose(found.sum(-1), torch.ones_like(found[:, 0]), atol=1e-2):
            found = found.clamp(min=torch.finfo(torch.float32).tiny).log()  # some return probabilities
        centered = [entry - entry.amax(dim=-1, keepdim=True) for entry in (found, logits)]
        self.is_linear &= torch.allclose(*centered, rtol=0.05, atol=0.1)
        index = routing.top_k_index.reshape(-1, routing.top_k_index.shape[-1])[:room]
        self.hidden_states.append(x.cpu())
        self.smallest.append(logits.gather(-1, index).amin(dim=-1).cpu())


@torch.no_grad()
def measure_rows(
    model: nn.Module, routers: dict[int, MergedRouter], batches: Iterable[Mapping[str, Any]]
) -> dict[int, torch.Tensor]:
    """Run `batches` once and find, for each of these layers, a row whose logit lies far below every chosen one.

    At most 16384 tokens of each layer are measured, padding among them; further batches are not run.

    Args:
        model (`nn.Module`): the base model, with the adapters active that will be merged.
        routers (`dict[int, MergedRouter]`): layer → its router after merging.
        batches (`Iterable[Mapping[str, Any]]`): inputs of the model.

    Returns:
        `dict[int, torch.Tensor]`: layer → row `(D,)`, float32, on the CPU.

    Raises:
        ValueError: there is no batch; a router does more with its input than to multiply it by its matrix; or the inputs
            of a layer share no direction.
    """
    inputs = {layer: _Inputs(merged) for layer, merged in routers.items()}
    hooks = [
        model.get_submodule(entry.merged.block.router).register_forward_hook(entry, with_kwargs=True)
        for entry in inputs.values()
    ]
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"pad_experts must be True or an iterable of batches, each a dictionary of what the model takes, but "
                    f"yields {type(batch).__name__}."
                )
            model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()})
            if all(entry.num_tokens >= MAX_TOKENS for entry in inputs.values()):
                break
    finally:
        for hook in hooks:
            hook.remove()
        for module, is_training in modes:
            module.training = is_training
    return {layer: _row(layer, entry) for layer, entry in inputs.items()}


def _row(layer: int, inputs: _Inputs) -> torch.Tensor:
    name = inputs.merged.block.router
    if not inputs.num_tokens:
        raise ValueError(
            f"pad_experts yields no batch that reaches '{name}'. Give at least one batch of model inputs."
        )
    if not inputs.is_linear:
        raise ValueError(
            f"'{name}' does more with its input than to multiply it by one matrix, so no row for a pad can be measured. "
            "Keep the adapter, or give all layers the same number of new experts."
        )
    x = torch.cat(inputs.hidden_states).float()
    direction, margin = shared_direction(F.normalize(x, dim=-1))
    if margin < MIN_MARGIN:
        raise ValueError(
            f"The {len(x)} measured inputs of '{name}' share no direction (best cosine to the worst of them: {margin:.1e}), "
            f"so every row of layer {layer} would be chosen for some of them. Keep the adapter, or give all layers the same "
            "number of new experts."
        )
    along = x @ direction
    scale = ((GAP - torch.cat(inputs.smallest)) / along).amax().clamp(min=0)
    logger.warning(
        f"'{name}': the pads have a row whose logit lies at least {GAP:.0f} below every chosen one on the {len(x)} measured "
        f"tokens (smallest cosine to their shared direction: {margin:.3f}). Nothing is known about other tokens."
    )
    return -scale * direction


def shared_direction(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A unit vector `u` with `u · x > 0` for all of `x`, if there is one, and the smallest `u · x`.

    Begins at the mean and goes to the point of the convex hull that is closest to 0 (Gilbert 1966), whose direction has the
    largest margin; stops at half of what is possible.

    Args:
        x (`torch.Tensor` of shape `(T, D)`): unit vectors.
    """
    point = x.mean(dim=0)
    best, best_margin = point, -float("inf")
    for _ in range(MAX_STEPS):
        norm = point.norm()
        scores = x @ point
        worst = scores.argmin()
        margin = float(scores[worst] / norm)
        if margin > best_margin:
            best, best_margin = point / norm, margin
        if margin >= 0.5 * norm or norm < MIN_MARGIN:  # the norm bounds every margin from above
            break
        step = x[worst] - point
        point = point + (-(point @ step) / (step @ step)).clamp(0, 1) * step
    return best, best_margin
