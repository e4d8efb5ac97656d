"""What the two layers of an extended mixture of experts share, its router and its experts."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...foreign_moe import MoeBlock
from .config import MoExtendConfig


MERGE_IN_PLACE_IS_IMPOSSIBLE = (
    "New experts need larger tensors than the base model has, so they cannot be merged in place. Use merge_and_unload(), "
    "which returns an enlarged model; or keep the adapter."
)


class MoExtendLayer(nn.Module, BaseTunerLayer):
    """What both layers share: which adapters act here.

    Args:
        base_layer (`nn.Module`): router or experts of the base model.
        block (`MoeBlock`): where that is.
    """

    prefix = "moextend_"
    other_param_names: tuple[str, ...] = ("num_new",)

    def __init__(self, base_layer: nn.Module, block: MoeBlock) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block = block
        self.num_new: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def acting(self) -> list[str]:
        """The active adapters that have new experts here, in the order of their experts."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.num_new]

    def finish(self, adapter_name: str, config: MoExtendConfig) -> None:
        """Called at the end of adding an adapter."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT does, but buffers keep their type: a correction in float32 is not rounded to that of the weights."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        added = [container[adapter_name] for container in containers if adapter_name in container]
        owners = [owner for entry in added for owner in entry.modules()]
        before = [(owner, name, b) for owner in owners for name, b in owner.named_buffers(recurse=False)]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for owner, name, buffer in before:
            setattr(owner, name, buffer.to(getattr(owner, name).device))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Those of the first parameter: PEFT looks for a `weight`, which experts do not have."""
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: the tensors of the base model would need another shape."""
        raise ValueError(MERGE_IN_PLACE_IS_IMPOSSIBLE)

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""

    def __repr__(self) -> str:
        return "moextend." + super().__repr__()
