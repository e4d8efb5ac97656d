"""Tells routers with a limited capacity which tokens are padding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .moe_block import MoeLlavaSparseMoeBlock


TOKEN_MASK = "moe_token_mask"


class TakesTokenMask:
    """Makes a decoder layer hand the mask among its arguments to its mixture.

    The mask is an argument of the layer, so that a recomputed layer sees the mask of its own forward. The layer takes it
    in `forward`: not all layers hand arguments that they do not know to their attention, and newer versions of
    transformers recompute layers without their hooks.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer, which does not see the mask."""
        token_mask = kwargs.pop(TOKEN_MASK, None)
        self.had_token_mask = token_mask is not None
        # looked up in each call: replicas, copies and wrapped blocks have to find their own
        for part in self.modules():
            if isinstance(part, MoeLlavaSparseMoeBlock):
                part.take_token_mask(token_mask)
        return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # the class is made on the fly and has the name of another, so that pickle would not find it
        return _empty_layer, (type(self).layer_class,), self.__dict__


def take_token_mask(layer: nn.Module) -> None:
    """Make a decoder layer take the mask; its class keeps its name, by which device maps and FSDP know it."""
    layer.__class__ = _class_that_takes_token_mask(type(layer))


def check_token_mask_arrived(layers: nn.ModuleList) -> None:
    """Raise a `RuntimeError` if a layer was last called without the mask."""
    missed = [index for index, layer in enumerate(layers) if getattr(layer, "had_token_mask", None) is False]
    if missed:
        raise RuntimeError(
            f"router_drop needs to know which tokens are padding, but the text model did not hand {TOKEN_MASK!r} on to its "
            f"layers {missed}. Use router_drop=None, or another text model."
        )


def token_mask_of(attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
    """Which of the last `num_tokens` tokens are padding (0), or `None` where the mask does not say so token by token."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_tokens:] if attention_mask.shape[1] >= num_tokens else None


@functools.cache
def _class_that_takes_token_mask(layer_class: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(layer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(layer_class.__name__, (TakesTokenMask, layer_class), {**names, "layer_class": layer_class})


def _empty_layer(layer_class: type[nn.Module]) -> nn.Module:
    cls = _class_that_takes_token_mask(layer_class)
    return cls.__new__(cls)
