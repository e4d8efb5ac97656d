"""What the tuners with LoRA experts share: choosing linears, checking them all before the first one is touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..foreign_moe import base_of
from .base import MoeTuner
from .lora_config import LoraExpertsConfig
from .lora_layer import LoraExpertsLayer
from .structure import check_target, shorten


class LoraExpertsModel(MoeTuner):
    """Base class of the tuners that put LoRA experts into linears."""

    target_module_mapping: dict[str, list[str]] = {}

    def _select(self, names: list[str], peft_config: LoraExpertsConfig, *, may_be_empty: bool = False) -> set[str]:
        """What to put into a configuration to get exactly `names`: none of another tower of a multi-modal model, and
        none of a layer that `layers_to_transform` leaves out, which PEFT does not look at where a name is given in
        full.

        Raises:
            NoMatchingPeftModuleError: `layers_to_transform` leaves nothing of `names`, and that is not allowed.
        """
        chosen = shorten(names, [name for name, _ in self.model.named_modules()])
        chosen = {name for name in chosen if name not in names or _is_in_layers(peft_config, name)}
        if names and not chosen and not may_be_empty:
            raise NoMatchingPeftModuleError(
                f"layers_to_transform={peft_config.layers_to_transform} and layers_pattern="
                f"{peft_config.layers_pattern!r} leave none of the {len(names)} linears that {peft_config.method} "
                f"found in {type(self.model).__name__}, such as '{names[0]}'. Name layers that the model has, or "
                "leave both out."
            )
        return chosen

    def _targets(self, peft_config: LoraExpertsConfig, model: nn.Module) -> list[str]:
        """Names of the linears that get experts, each checked.

        Raises:
            NoMatchingPeftModuleError: there are none.
            ValueError: one cannot have experts.
        """
        names = []
        for name, module in adaptable_modules(model):
            if is_target(peft_config, name):
                if isinstance(module, LoraExpertsLayer) and not isinstance(module, self.tuner_layer_cls):
                    raise ValueError(
                        f"'{name}' is a {type(module).__name__} already: a linear cannot have experts of two methods. "
                        f"Give this adapter other target_modules, or remove the first one with unload()."
                    )
                check_target(model, name, base_of(module), method=peft_config.method)
                names.append(name)
        if not names:
            raise NoMatchingPeftModuleError(
                f"Target modules {_shown(peft_config.target_modules)} not found in the base model: no module of "
                f"{type(model).__name__} gets experts, because nothing matches that exclude_modules and "
                "layers_to_transform leave. Compare the names with those of model.named_modules(), or leave "
                "target_modules out to find them by structure."
            )
        return names

    def _new_layer(self, target: nn.Module, name: str) -> LoraExpertsLayer:
        """The layer that replaces the linear `target`."""
        raise NotImplementedError

    def _update_layer(self, layer: LoraExpertsLayer, adapter_name: str, peft_config: Any, **settings: Any) -> None:
        """Add the adapter to a layer; `settings` are `r` and `lora_alpha` with patterns applied."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: LoraExpertsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, self.tuner_layer_cls):
            layer = self._new_layer(target, current_key)
            layer._active_adapter = adapter_name
            is_encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            layer.is_decoder = is_encoder_decoder and "decoder" in current_key.split(".")
        self._update_layer(
            layer,
            adapter_name,
            peft_config,
            r=by_pattern(peft_config.rank_pattern, current_key, peft_config.r),
            lora_alpha=by_pattern(peft_config.alpha_pattern, current_key, peft_config.lora_alpha),
        )
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters where that is exact; any other raises before anything is changed."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        return super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, LoraExpertsLayer):
                for adapter_name in adapter_names or self.active_adapters:
                    if adapter_name in module.r:
                        module.check_mergeable(adapter_name)


def adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside a layer that has adapters already."""
    inside = ""
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        yield name, module
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."


def is_target(config: LoraExpertsConfig, name: str, **other_fields: Any) -> Any:
    """Whether `target_modules` and the fields that restrict it choose the module `name`.

    Args:
        config (`LoraExpertsConfig`), name (`str`): the fields, and the full name of the module.
        other_fields: what to take instead of a field of `config`.

    Returns:
        What PEFT says: false is not only `False`, but also its marker for an excluded module.
    """
    if other_fields:
        config = copy.copy(config)
        vars(config).update(other_fields)
    return check_target_module_exists(config, name)


def by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value whose key matches `name`, or `default`."""
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _is_in_layers(config: LoraExpertsConfig, name: str) -> bool:
    """Whether `layers_to_transform` allows the module `name`."""
    last = [name.rpartition(".")[2]]
    return bool(is_target(config, name, target_modules=last, exclude_modules=None, modules_to_save=None))


def _shown(target_modules: set[str] | list[str] | str | None) -> str:
    return repr(target_modules if isinstance(target_modules, str) else sorted(target_modules or ()))
