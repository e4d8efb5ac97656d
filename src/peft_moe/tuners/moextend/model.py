"""`MoExtendModel`: gives layers of a pretrained mixture of experts new experts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...foreign_moe import BASE, EXPERTS_NAME, MoeBlock, RouterProbe, base_of, find_moe_blocks, probe
from ..base import MoeTuner
from ..structure import is_sharded
from .config import MoExtendConfig
from .enlarge import check_enlargeable, enlarge
from .experts import MoExtendExperts
from .layer import MERGE_IN_PLACE_IS_IMPOSSIBLE, MoExtendLayer
from .router import MoExtendRouter


FLAG = "output_router_logits"
RESERVED_NAMES = (BASE, EXPERTS_NAME)
LEAST_THAT_LEARNS = -10.0
"""guard_offset at which the gradient of a balance loss of 0.001 is about the epsilon of Adam, 1e-8"""

KEEP_ROUTERS_OUT = (
    "Quantise linears outside of the mixtures only: leave out what they consist of by a pattern, such as "
    "'.*router.*', beside 'lm_head' in llm_int8_skip_modules (BitsAndBytesConfig) or modules_to_not_convert "
    "(TorchAoConfig)."
)


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
        """Inject an adapter as PEFT does; the model's own load-balancing loss is then kept out of its loss."""
        if adapter_name in RESERVED_NAMES:
            raise ValueError(
                f"An adapter of MoExtend cannot be called {adapter_name!r}, which means a part of the base model: its "
                "expert counts or its experts. Choose another adapter_name."
            )
        # fields are filled in below, and the caller may use the same object for another base model
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_native_loss_out(model)

    def _prepare_adapter_config(self, peft_config: MoExtendConfig, model_config: dict[str, Any]) -> MoExtendConfig:
        """Find the blocks and check everything before the first one is touched."""
        self._check_whole()
        self._blocks = self._wanted_blocks(peft_config)
        self._probes = {block.layer: self._check_block(peft_config, block) for block in self._blocks}
        found = {block.layer: block.num_experts for block in self._blocks}
        if peft_config.base_num_experts is not None and peft_config.base_num_experts != found:
            raise ValueError(
                "The adapter was made for a base model with these experts per layer (base_num_experts): "
                f"{peft_config.base_num_experts}; "
                f"{type(self.model).__name__} has {found}. Load the base model that its adapter_config.json names."
            )
        is_new = peft_config.base_num_experts is None
        peft_config.base_num_experts = found
        self._note_router(peft_config)
        if is_new and not peft_config.inference_mode:
            warn_of_a_guard_for_good(peft_config)
            if peft_config.calibration == "released_code":
                warn_of_fixed_weights(self._probes)
        self._announce_sources(peft_config, is_new=is_new)
        targets = {name for block in self._blocks for name in (block.router, block.experts)}
        peft_config.target_modules = targets  # type: ignore[assignment]
        return peft_config

    def _check_whole(self) -> None:
        sharded = [name for name, p in self.model.named_parameters() if is_sharded(p) or hasattr(p, "ds_id")]
        if sharded:
            raise ValueError(
                f"{type(self.model).__name__} is spread over processes ({len(sharded)} parameters, for example "
                f"'{sharded[0]}'), so that no expert can be copied. Load the base model whole (without "
                "distributed_config, and before TrainingArguments that name DeepSpeed ZeRO-3), make the PeftModel, "
                "and share that out."
            )

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
                + (f"\n{KEEP_ROUTERS_OUT}" if refused and getattr(self.model, "is_quantized", False) else "")
            )
        if wanted is None and refused:
            raise ValueError(
                f"Some mixtures of experts of {kind} cannot get new experts. Name the layers in `layers`; those that "
                f"can are {sorted(blocks)}. Refused:{reasons}"
            )
        return [block for layer, block in sorted(blocks.items()) if wanted is None or layer in wanted]

    def _check_block(self, config: MoExtendConfig, block: MoeBlock) -> RouterProbe:
        router = base_of(self.model.get_submodule(block.router))
        for name in (block.router, block.experts):
            layer = self.model.get_submodule(name)
            if isinstance(layer, BaseTunerLayer) and not isinstance(layer, MoExtendLayer):
                raise ValueError(
                    f"'{name}' carries an adapter of another method ({type(layer).__name__}), for as many experts as "
                    "the base model has. Merge it first (merge_and_unload), or leave routers and experts out of its "
                    "target_modules and target_parameters."
                )
            quantised = [n for n, p in base_of(self.model.get_submodule(name)).named_parameters() if is_quantised(p)]
            if quantised:
                raise ValueError(
                    f"'{name}.{quantised[0]}' is quantised, and a row or an expert that trains cannot be added to it. "
                    f"{KEEP_ROUTERS_OUT}"
                )
        found = probe(router, block, config.num_new_experts_in(block.layer))
        if found.problem:
            raise ValueError(
                f"'{block.router}' ({type(router).__name__}) {found.problem}. Without that MoExtend cannot extend "
                "this router."
                + (
                    ""
                    if "num_new_experts" in found.problem
                    else " Newer versions of transformers lay out more families."
                )
            )
        if config.init == "copy_guarded" and not found.takes_offset:
            raise ValueError(
                f"'{block.router}' ({type(router).__name__}) has no place for the offset of copy_guarded: it does "
                "more with its input than to multiply it by one matrix. Use another init."
            )
        wrong = [source for source in config.sources_in(block.layer) if source >= block.num_experts]
        if wrong:
            raise ValueError(
                f"copy_sources[{block.layer}] names expert {wrong[0]}, but '{block.experts}' has {block.num_experts} "
                f"experts, counted from 0 to {block.num_experts - 1}."
            )
        if config.calibration == "released_code" and found.scoring is None:
            raise ValueError(
                f"calibration='released_code' corrects probabilities, but the weights of '{block.router}' "
                f"({type(router).__name__}) are proportional neither to the softmax nor to the sigmoid of its logits. "
                "Use calibration='paper' or None."
            )
        return found

    def _note_router(self, config: MoExtendConfig) -> None:
        """Say so where an adapter of this shape was made for routers of another family."""
        found = type(base_of(self.model.get_submodule(self._blocks[0].router))).__name__
        if config.base_router not in (None, found):
            warnings.warn(
                f"The adapter was made for routers of the class {config.base_router}, but {type(self.model).__name__} "
                f"has {found}. Shapes agree, so it loads; unless the class was only renamed, load the base model that "
                "its adapter_config.json names.",
                stacklevel=2,
            )
        config.base_router = config.base_router or found

    def _announce_sources(self, config: MoExtendConfig, *, is_new: bool) -> None:
        layers = {block.layer for block in self._blocks}
        unknown = sorted(set(config.copy_sources or {}) - layers)
        if unknown:
            raise ValueError(
                f"copy_sources names layers {unknown}, which get no new experts. Those that do: {sorted(layers)}."
            )
        absent = sorted(layers - set(config.copy_sources or {}))
        if absent and is_new and not config.inference_mode:
            warnings.warn(
                f"MoExtend: no copy_sources for layers {absent}, so their new experts begin as copies of expert 0. "
                "The paper copies the expert that was chosen most often on the new domain.",
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
                layer = MoExtendRouter(target, block, self._probes[block.layer], self.recorder, self.aux_loss)
            else:
                layer = MoExtendExperts(target, block)
            layer._active_adapter = adapter_name
            layer.train(target.training)
        if isinstance(layer, MoExtendRouter):
            layer.update_layer(adapter_name, peft_config, correction=block.correction_in(self.model))
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

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        pad_experts: bool = False,
    ) -> nn.Module:
        """A plain model with larger experts and routers, which loads without this package.

        Args:
            progressbar (`bool`): as in PEFT.
            safe_merge (`bool`): look for values that are not finite first.
            adapter_names (`list[str]`, *optional*): what to merge; by default the active adapters.
            pad_experts (`bool`):
                What to do where layers get different numbers of new experts, and the configuration of the model has
                one number for all. `False` raises. `True` fills up with experts that change no output, whatever the
                input is; that takes a router with a bias or a correction for each expert, or one that chooses a single
                expert of weight 1. For other routers it raises too.

        Raises:
            ValueError: with the reasons why no plain model computes the same.
        """
        if not isinstance(pad_experts, bool):
            raise ValueError(
                f"pad_experts must be True or False, but is {type(pad_experts).__name__}. Pads are exact or refused; "
                "none are measured on batches."
            )
        names = list(adapter_names or self.active_adapters)
        pads = check_enlargeable(self.model, names, safe_merge=safe_merge, pad_experts=pad_experts)
        with self._only_active(names):
            enlarge(self.model, names, pads)
            return self._unload_and_optionally_merge(False, progressbar=progressbar)

    @contextmanager
    def _only_active(self, names: list[str]) -> Iterator[None]:
        """Within this context these adapters act and no others, in their `modules_to_save` too, which have one
        each."""
        layers = [m for m in self.model.modules() if isinstance(m, MoExtendLayer | ModulesToSaveWrapper)]
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
        try:
            for layer in layers:
                layer._active_adapter, layer._disable_adapters = names, False
                if isinstance(layer, ModulesToSaveWrapper):
                    layer._active_adapter = next((name for name in names if name in layer.modules_to_save), [])
            yield
        finally:
            for layer, active, is_disabled in before:
                layer._active_adapter, layer._disable_adapters = active, is_disabled

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            return self.merge_and_unload(*args, **kwargs)
        for handle, hook in list(self.model._forward_pre_hooks.items()):
            if isinstance(hook, _KeepNativeLossOut):
                del self.model._forward_pre_hooks[handle]
                self.model._forward_pre_hooks_with_kwargs.pop(handle, None)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def warn_of_a_guard_for_good(config: MoExtendConfig) -> None:
    """Warn of a `copy_guarded` whose new experts no gradient would ever wake."""
    if config.init != "copy_guarded" or (config.guard_offset >= LEAST_THAT_LEARNS and config.router_aux_loss_coef):
        return
    warnings.warn(
        f"init='copy_guarded' with guard_offset={config.guard_offset} and router_aux_loss_coef="
        f"{config.router_aux_loss_coef}: no token chooses the new experts, and no gradient raises their offset, so "
        "they will not learn. To train, set guard_offset=-8 and a router_aux_loss_coef above 0, or take another init.",
        stacklevel=2,
    )


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a parameter is stored in fewer bits: as integers (bitsandbytes), or as a tensor class of torchao."""
    return not parameter.is_floating_point() or type(parameter.data).__module__.startswith("torchao.")


def warn_of_fixed_weights(probes: Mapping[int, RouterProbe]) -> None:
    """Warn of routers that give their only chosen expert a fixed weight, which `"released_code"` cannot change."""
    fixed = [layer for layer, found in probes.items() if (s := found.scoring) and s.is_single and s.is_normalized]
    if fixed:
        warnings.warn(
            "calibration='released_code' shares out a fixed sum of weights among the chosen experts, but the routers "
            f"of layers {fixed} choose one expert per token, so it changes nothing there and does not train. Use "
            "calibration='paper' or None.",
            stacklevel=2,
        )


class _KeepNativeLossOut:
    """Forward pre-hook of a model with a head, whose own load-balancing loss would count twice, or fail.

    That loss counts the E experts of the configuration in every layer, and stacks the logits of all layers, which have
    E + N entries where experts are new. What balances the extended layers is the loss of `MoExtendConfig`, which needs
    nothing of the head. A head that balances in training without being asked (`MoeLlava`) is called with the
    `output_router_logits=False` that it offers for this; whoever asks for logits is told why.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config = getattr(module, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        is_asked = kwargs.get(FLAG)
        if is_asked is None:
            is_asked = getattr(config, FLAG, False)
        balances_unasked = module.training and getattr(module, "balances_in_training", False)
        if not (is_asked or balances_unasked):
            return None
        if not any(isinstance(inner, MoExtendRouter) and inner.acting() for inner in module.modules()):
            return None
        if is_asked:
            raise ValueError(
                f"{type(module).__name__} was asked for router logits ({FLAG}=True, in the call or in its "
                "configuration), for a load-balancing loss of its own that counts the experts of the base model only. "
                "Set it to False; trl's trainers, which ask by themselves, need router_aux_loss_coef=0.0 in their "
                "configuration. The loss of MoExtendConfig acts without it, and get_aux_loss(model) gives its "
                f"value. The logits alone are returned by the backbone without the head, called with {FLAG}=True."
            )
        return args, {**kwargs, FLAG: False}


def keep_native_loss_out(model: nn.Module) -> None:
    """Install the hook, unless it is there or `model` is a backbone without a head."""
    backbone = getattr(model, "base_model", None)
    is_there = any(isinstance(hook, _KeepNativeLossOut) for hook in model._forward_pre_hooks.values())
    if isinstance(backbone, nn.Module) and backbone is not model and not is_there:
        model.register_forward_pre_hook(_KeepNativeLossOut(), with_kwargs=True)
