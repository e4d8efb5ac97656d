"""`MoExtendModel`: gives layers of a pretrained mixture of experts new experts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...pretrained_moe import MoeBlock, base_of, find_moe_blocks, probe
from ..base import MoeTuner
from .calibration import measure_scoring
from .config import MoExtendConfig
from .enlarge import check_enlargeable, enlarge
from .layer import MERGE_IN_PLACE_IS_IMPOSSIBLE, MoExtendExperts, MoExtendLayer, MoExtendRouter
from .native_router_logits import close_native_router_logits, open_native_router_logits


class MoExtendModel(MoeTuner):
    """Gives layers of a pretrained mixture of experts new experts (MoExtend,
    https://huggingface.co/papers/2408.03511).

    Args:
        model (`torch.nn.Module`): the model to be adapted.
        config (`MoExtendConfig`): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    **Attributes**:
        - **model** (`torch.nn.Module`) -- the adapted model.
        - **peft_config** (`dict[str, MoExtendConfig]`) -- the configuration of each adapter.
        - **recorder** (`RoutingRecorder`) -- what the extended routers decided in the last forward pass.
    """

    prefix = "moextend_"
    tuner_layer_cls = MoExtendLayer
    target_module_mapping: dict[str, list[str]] = {}
    tags = ("peft_moe", "moextend")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does; `output_router_logits` then goes past the model's own load-balancing loss."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        open_native_router_logits(model, self.recorder)

    def _prepare_adapter_config(self, peft_config: MoExtendConfig, model_config: dict[str, Any]) -> MoExtendConfig:
        """Find the blocks and check everything before the first one is touched."""
        self._blocks = self._wanted_blocks(peft_config)
        for block in self._blocks:
            self._check_block(peft_config, block)
        found = {block.layer: block.num_experts for block in self._blocks}
        if peft_config.base_num_experts is not None and peft_config.base_num_experts != found:
            raise ValueError(
                f"The adapter was made for a base model with these experts per layer: {peft_config.base_num_experts}; "
                f"{type(self.model).__name__} has {found}. Load the base model that its adapter_config.json names."
            )
        peft_config.base_num_experts = found
        self._announce_sources(peft_config)
        peft_config.target_modules = {name for block in self._blocks for name in (block.router, block.experts)}  # type: ignore[assignment]
        return peft_config

    def _wanted_blocks(self, config: MoExtendConfig) -> list[MoeBlock]:
        blocks, refused = find_moe_blocks(self.model)
        reasons = "".join(f"\n  - {reason}" for reason in refused)
        kind = type(self.model).__name__
        if not blocks and not refused:
            raise ValueError(
                f"{kind} has no mixture of experts: no module has a child 'experts' with stacked parameters. MoExtend "
                "extends pretrained mixtures. Make one of a dense model by upcycling, or use MoLEConfig."
            )
        wanted = config.wanted_layers()
        missing = [layer for layer in ([] if wanted is None else wanted) if layer not in blocks]
        if not blocks or missing:
            what = f"Layers {missing} of {kind}" if blocks else f"The mixtures of experts of {kind}"
            raise ValueError(
                f"{what} cannot get new experts. Layers that can: {sorted(blocks)}."
                + (f" Refused:{reasons}" if refused else "")
            )
        if wanted is None and refused:
            raise ValueError(
                f"Some mixtures of experts of {kind} cannot get new experts. Name the layers in `layers`; those that can "
                f"are {sorted(blocks)}. Refused:{reasons}"
            )
        return [block for layer, block in sorted(blocks.items()) if wanted is None or layer in wanted]

    def _check_block(self, config: MoExtendConfig, block: MoeBlock) -> None:
        router = base_of(self.model.get_submodule(block.router))
        num_new = config.num_new_experts_in(block.layer)
        routing = probe(router, block, num_new)
        if isinstance(routing, str):
            raise ValueError(
                f"'{block.router}' ({type(router).__name__}) {routing}. Without that MoExtend cannot extend "
                "this router. (Newer versions of transformers lay out more families so that it can.)"
            )
        if config.init == "copy_guarded" and isinstance(probe(router, block, num_new, has_offset=True), str):
            raise ValueError(
                f"'{block.router}' ({type(router).__name__}) has no place for the offset of copy_guarded: it does more with "
                "its input than to multiply it by one matrix. Use another init."
            )
        wrong = [source for source in config.sources_in(block.layer) if source >= block.num_experts]
        if wrong:
            raise ValueError(
                f"copy_sources[{block.layer}] names expert {wrong[0]}, but '{block.experts}' has {block.num_experts} "
                f"experts, counted from 0 to {block.num_experts - 1}."
            )
        if config.calibration == "released_code" and measure_scoring(router, block) is None:
            raise ValueError(
                f"calibration='released_code' corrects probabilities, but the weights of '{block.router}' "
                f"({type(router).__name__}) are proportional neither to the softmax nor to the sigmoid of its logits. Use "
                "calibration='paper' or None."
            )

    def _announce_sources(self, config: MoExtendConfig) -> None:
        layers = {block.layer for block in self._blocks}
        unknown = sorted(set(config.copy_sources or {}) - layers)
        if unknown:
            raise ValueError(
                f"copy_sources names layers {unknown}, which get no new experts. Those that do: {sorted(layers)}."
            )
        absent = sorted(layers - set(config.copy_sources or {}))
        if absent and not config.inference_mode:
            warnings.warn(
                f"MoExtend: no copy_sources for layers {absent}, so their new experts begin as copies of expert 0. The "
                "paper copies the expert that was chosen most often on the new domain.",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: MoExtendConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        block = next(block for block in self._blocks if current_key in (block.router, block.experts))
        layer = target
        if not isinstance(layer, MoExtendLayer):
            if current_key == block.router:
                layer = MoExtendRouter(target, block, self.recorder, self.aux_loss)
            else:
                layer = MoExtendExperts(target, block)
            layer._active_adapter = adapter_name
            layer.train(target.training)
        if isinstance(layer, MoExtendRouter):
            correction = None if block.correction is None else _tensor(self.model, block.correction)
            layer.update_layer(adapter_name, peft_config, correction=correction)
        else:
            layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own reads `child.weight`, which experts do not have."""
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise `ValueError`: new experts need larger tensors."""
        raise ValueError(MERGE_IN_PLACE_IS_IMPOSSIBLE)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        *args: Any,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if merge:
            names = list(adapter_names or self.active_adapters)
            check_enlargeable(self.model, names, safe_merge=safe_merge)
            enlarge(self.model, names)
        close_native_router_logits(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or a buffer by its full name."""
    owner, _, own = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), own)
    return tensor
