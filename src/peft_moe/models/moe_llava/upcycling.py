"""Makes a sparse LLaVA out of dense ones: every expert starts as a copy of the MLP that it replaces."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from .configuration_moe_llava import MoeLlavaConfig
from .dense_mlp import DenseMlp, find_dense_mlp
from .text_backbone import decoder_layers


MOE_FIELDS = frozenset(inspect.get_annotations(MoeLlavaConfig))
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def upcycle(
    model_class: type[PreTrainedModel], dense: Any, *, fields: dict[str, Any], expert_noise: float, **kwargs: Any
) -> PreTrainedModel:
    """What [`MoeLlavaForConditionalGeneration.from_dense`] does; see there."""
    fields = {**fields, **{name: kwargs.pop(name) for name in list(kwargs) if name in MOE_FIELDS}}
    experts_implementation = kwargs.pop("experts_implementation", None)
    if expert_noise < 0:
        raise ValueError(f"expert_noise must not be negative, but is {expert_noise}.")
    sources = list(dense) if isinstance(dense, list | tuple) else [dense]
    models = [_load(source, kwargs) for source in sources]
    config = _sparse_config(models[0], fields)
    _check_sources(models, config)
    if experts_implementation is not None:
        config._experts_implementation = experts_implementation
    with torch.device("meta"):
        model = model_class(config)
    owned = not isinstance(sources[0], PreTrainedModel)
    model.load_state_dict(_state(model, models, expert_noise=expert_noise, owned=owned), strict=True, assign=True)
    _copy_buffers(model, models[0])
    model.tie_weights()
    model.generation_config = copy.deepcopy(models[0].generation_config)
    return model.train(models[0].training)


def model_type_of(name_or_path: Any, kwargs: dict[str, Any]) -> str | None:
    """The `model_type` of a checkpoint, without loading it; `kwargs` are those of `from_pretrained`."""
    used = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    return PreTrainedConfig.get_config_dict(name_or_path, **used)[0].get("model_type")


def _load(source: Any, kwargs: dict[str, Any]) -> LlavaForConditionalGeneration:
    if isinstance(source, nn.Module):
        _refuse_adapters(source)
        if not isinstance(source, LlavaForConditionalGeneration) or source.config.model_type != "llava":
            raise TypeError(f"from_dense needs a LlavaForConditionalGeneration, but found {type(source).__name__}.")
        if kwargs:
            raise TypeError(
                f"{', '.join(sorted(kwargs))} cannot be used with a model that is loaded already: no such field of "
                f"MoeLlavaConfig. Fields are {', '.join(sorted(MOE_FIELDS))}."
            )
        model = source
    else:
        model_type = model_type_of(source, kwargs)
        if model_type != "llava":
            raise TypeError(f"from_dense needs a LLaVA, but {str(source)!r} is of type {model_type!r}.")
        model = LlavaForConditionalGeneration.from_pretrained(source, **kwargs)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "from_dense needs weights that are not quantized. Load the model without quantization_config."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            "from_dense needs the dense model on one device. Load it without device_map, save the sparse model, and "
            "load that one with device_map."
        )
    return model


def _refuse_adapters(model: nn.Module) -> None:
    """The weights under an adapter are not what the model computes with."""
    is_wrapped = not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config")
    wrappers = ("base_layer", "original_module")
    if is_wrapped or any(name.rpartition(".")[2] in wrappers for name, _ in model.named_modules()):
        raise TypeError(
            f"from_dense needs a LLaVA without adapters, but {type(model).__name__} has some. Merge them with "
            "model.merge_and_unload(), or save the merged model and name its folder."
        )


def _sparse_config(dense: LlavaForConditionalGeneration, fields: dict[str, Any]) -> MoeLlavaConfig:
    not_own = ("architectures", "model_type", "auto_map", "transformers_version")
    own = {name: value for name, value in dense.config.to_dict().items() if name not in not_own}
    parts = {name: copy.deepcopy(getattr(dense.config, name)) for name in ("text_config", "vision_config")}
    attention = {name: part._attn_implementation for name, part in parts.items()}
    config = MoeLlavaConfig(**{**own, **parts, **fields})
    config._attn_implementation = {"": dense.config._attn_implementation, **attention}
    config.dtype = dense.config.dtype
    return config


def _check_sources(models: Sequence[LlavaForConditionalGeneration], config: MoeLlavaConfig) -> None:
    fewest = min(config.num_experts_by_layer.values())
    if len(models) > fewest:
        raise ValueError(
            f"{len(models)} dense models were given, but a layer has only {fewest} experts to copy them to."
        )
    for number, model in enumerate(models[1:], start=1):
        for layer in config.moe_layer_indices:
            first, other = (_mlp(dense, layer).description for dense in (models[0], model))
            if first != other:
                raise ValueError(
                    f"The MLP of layer {layer} of dense model {number} does not fit that of the first: {other} "
                    f"instead of {first}."
                )


def _mlp(model: LlavaForConditionalGeneration, layer: int) -> DenseMlp:
    layers = decoder_layers(model.model.language_model)
    return find_dense_mlp(layers[layer], layer_name=f"model.language_model.layers.{layer}")


def _state(
    model: PreTrainedModel, models: Sequence[LlavaForConditionalGeneration], *, expert_noise: float, owned: bool
) -> dict[str, torch.Tensor]:
    """Every tensor of the sparse model; those of a dense model that nobody else holds are taken without a copy."""
    state = {name: tensor.detach() for name, tensor in models[0].state_dict().items()}
    shared = {tensor.data_ptr() for tensor in state.values()}
    for layer, num_experts in model.config.num_experts_by_layer.items():
        mlps = [_mlp(dense, layer) for dense in models]
        name = f"model.language_model.layers.{layer}.{mlps[0].name}"
        dense_names = [key for key in state if key.startswith(f"{name}.")]
        dense_mlp = {key.removeprefix(f"{name}."): state.pop(key) for key in dense_names}
        block = model.get_submodule(name)
        stacked = _stack(mlps, num_experts)
        _check_same_function(block.experts, stacked, mlps, layer)
        if expert_noise:
            _add_noise(stacked, expert_noise)
        state.update({f"{name}.experts.{key}": value for key, value in stacked.items()})
        device, dtype = mlps[0].down_weight.device, mlps[0].down_weight.dtype
        router = copy.deepcopy(block.gate).to_empty(device=device)
        router.reset_parameters()
        state[f"{name}.gate.weight"] = router.weight.detach()
        if block.use_residual:
            state.update({f"{name}.residual_mlp.{key}": value for key, value in dense_mlp.items()})
            mixer = nn.Linear(block.gate.hidden_dim, 2, device=device, dtype=dtype)
            state.update({f"{name}.residual_gate.{key}": value for key, value in mixer.state_dict().items()})
    if owned:
        return state
    return {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in state.items()}


def _stack(mlps: Sequence[DenseMlp], num_experts: int) -> dict[str, torch.Tensor]:
    copies = [mlp.expert_tensors() for mlp in mlps]
    return {name: torch.stack([copies[e % len(copies)][name] for e in range(num_experts)]) for name in copies[0]}


def _add_noise(stacked: dict[str, torch.Tensor], expert_noise: float) -> None:
    for name, tensor in stacked.items():
        if not name.endswith("_bias"):
            width = tensor.float().std(dim=(1, 2), keepdim=True).to(tensor.dtype)
            tensor += expert_noise * width * torch.randn_like(tensor)


def _copy_buffers(model: PreTrainedModel, dense: LlavaForConditionalGeneration) -> None:
    """Buffers that are not saved, such as rotary frequencies, which the sparse model has under the same names."""
    for name, buffer in dense.named_buffers():
        module_name, _, buffer_name = name.rpartition(".")
        model.get_submodule(module_name)._buffers[buffer_name] = buffer.clone()


@torch.no_grad()
def _check_same_function(
    experts: nn.Module, stacked: dict[str, torch.Tensor], mlps: Sequence[DenseMlp], layer: int
) -> None:
    """A structure that looks like an MLP and computes something else must not pass for one."""
    weight = mlps[0].down_weight
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, mlps[0].hidden_size, generator=generator).to(weight.device, weight.dtype)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    for expert, mlp in enumerate(mlps):
        index = torch.full((4, 1), expert, dtype=torch.long, device=weight.device)
        found = functional_call(experts, stacked, (tokens, index, torch.ones(4, 1, device=weight.device)))
        was_training = mlp.module.training
        expected = mlp.module.eval()(tokens)
        mlp.module.train(was_training)
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise ValueError(
                f"{type(mlp.module).__name__} computes something else than its linears suggest: the copy in layer "
                f"{layer} differs by {float((found - expected).abs().max()):.3g}. Choose another text model, or leave "
                "this layer out of moe_layers."
            )
