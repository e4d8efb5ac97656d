"""Turns the dense text model of a LLaVA into a sparse one, whatever its architecture."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, MixtralConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_llava import MoeLlavaConfig
from .dense_mlp import find_dense_mlp
from .experts import MoeLlavaSparseMoeBlock, StackedExperts
from .routing import MoeLlavaTopKRouter


class SparseModelMixin:
    """What transformers asks of a class before it hands it an experts implementation, and initialisation."""

    def initialize_weights(self) -> None:
        """Initialise what has no value yet, see [`~transformers.PreTrainedModel.initialize_weights`]."""
        # Of models that it does not contain, transformers never initialises modules without parameters of their own,
        # by which CLIP's attention and MLP set the width of their weights. That spares code which ignores the marks on
        # parameters that are loaded; all code here obeys them.
        self.is_custom_code = _false
        try:
            super().initialize_weights()
        finally:
            del self.is_custom_code

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the source of the module, which does not hold the experts, and caches what parents say
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """Whether the kernel accepts the sizes. If not, naming `"grouped_mm"` raises; the default is `"eager"`."""
        text_config = self.config.get_text_config(decoder=True)
        sizes = {name: getattr(text_config, name, None) for name in ("hidden_size", "intermediate_size")}
        uneven = [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size % 8]
        if uneven:
            raise ValueError(
                "experts_implementation='grouped_mm' needs sizes that are multiples of 8 (rows of 16 bytes), but the "
                f"text model has {', '.join(uneven)}. Use experts_implementation='eager' or 'batched_mm'."
            )
        return super()._grouped_mm_can_dispatch()


class SparseTextModelMixin(SparseModelMixin):
    """What a text model needs to hold mixtures: initial values for them, and a choice of what computes them."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MoeLlavaTopKRouter):
            module.reset_parameters()
        elif isinstance(module, StackedExperts):
            module.reset_parameters(std=getattr(self.config, "initializer_range", None) or 0.02)
        else:
            super()._init_weights(module)


def _false() -> bool:
    return False


@functools.cache
def sparse_class_of(dense_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of text models like `dense_class` that may hold mixtures: `LlamaModel` → `MoeLlavaLlamaModel`."""
    recorders = {
        **(dense_class._can_record_outputs or {}),
        "router_logits": OutputRecorder(MoeLlavaTopKRouter, index=0),
    }
    members = {"__module__": __name__, "_can_record_outputs": recorders}
    return type(f"MoeLlava{dense_class.__name__}", (SparseTextModelMixin, dense_class), members)


def __getattr__(name: str) -> Any:
    """Lets pickle find the classes above in a fresh process."""
    import transformers

    dense_class = getattr(transformers, name.removeprefix("MoeLlava"), None) if name.startswith("MoeLlava") else None
    if not (isinstance(dense_class, type) and issubclass(dense_class, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sparse_class_of(dense_class)


def build_text_model(config: MoeLlavaConfig) -> PreTrainedModel:
    """The text model that `config.text_config` describes, with mixtures where `config` wants them.

    Raises:
        ValueError: transformers knows no such text model, or one of the chosen layers has no MLP of a known structure.
    """
    text_config = config.text_config
    dense_class = MODEL_MAPPING.get(type(text_config), None)
    if isinstance(dense_class, list | tuple):
        dense_class = dense_class[0]
    if dense_class is None:
        raise ValueError(
            f"transformers has no model for a text_config of type {type(text_config).__name__}. Use the configuration "
            "of a decoder that transformers contains."
        )
    text_model = sparse_class_of(dense_class)._from_config(text_config)
    _sparsify(text_model, config)
    return text_model


def decoder_layers(text_model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a text model."""
    layers = getattr(text_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(text_model).__name__} keeps its decoder layers elsewhere than in 'layers', which MoeLlava needs. "
            "Choose another text model."
        )
    return layers


def _sparsify(text_model: PreTrainedModel, config: MoeLlavaConfig) -> None:
    layers = decoder_layers(text_model)
    blocks: dict[str, MoeLlavaSparseMoeBlock] = {}
    for index, num_experts in config.num_experts_by_layer.items():
        mlp = find_dense_mlp(layers[index], layer_name=f"layers.{index}")
        blocks[mlp.name] = MoeLlavaSparseMoeBlock(config, mlp, num_experts, text_model.config)
        setattr(layers[index], mlp.name, blocks[mlp.name])
    for name, block in blocks.items():
        _extend_plans(text_model, name, block, all_sparse=len(config.moe_layer_indices) == len(layers))
    text_model._keep_in_fp32_modules_strict = {
        *(text_model._keep_in_fp32_modules_strict or ()),
        *(f"{name}.gate.weight" for name in blocks),
    }


def _extend_plans(
    text_model: PreTrainedModel, mlp_name: str, block: MoeLlavaSparseMoeBlock, *, all_sparse: bool
) -> None:
    """Add the mixtures to the plans for tensor and expert parallelism, in the words of the installed transformers."""
    place = f"layers.*.{mlp_name}"
    has_gate, has_bias = block.experts.has_gate, block.experts.has_bias
    tp_plan, ep_plan = dict(text_model._tp_plan or {}), dict(text_model._ep_plan or {})
    dense_rules = {name: rule for name, rule in tp_plan.items() if name.startswith(f"{place}.")}
    if block.use_residual:
        tp_plan.update({name.replace(place, f"{place}.residual_mlp"): rule for name, rule in dense_rules.items()})
    if all_sparse:
        tp_plan = {name: rule for name, rule in tp_plan.items() if name not in dense_rules}
    # every rank would add the whole bias of down_proj, so that experts with biases are not split by columns
    if tp_plan and not has_bias:
        tp_plan.update(_mixtral_rules("base_model_tp_plan", place, has_gate=has_gate, has_bias=has_bias))
    ep_plan.update(_mixtral_rules("base_model_ep_plan", place, has_gate=has_gate, has_bias=has_bias))
    text_model._tp_plan, text_model._ep_plan = tp_plan, ep_plan


def _mixtral_rules(plan_name: str, place: str, *, has_gate: bool, has_bias: bool) -> dict[str, str]:
    rules = {}
    for name, rule in (getattr(MixtralConfig, plan_name) or {}).items():
        if ".mlp." not in name:
            continue
        name = name.replace("layers.*.mlp", place)
        if name.endswith("gate_up_proj") and not has_gate:
            name, rule = name.replace("gate_up_proj", "up_proj"), rule.replace("packed_", "")
        rules[name] = rule
        if has_bias and name.endswith("_proj"):
            rules[f"{name}_bias"] = rule
    return rules
