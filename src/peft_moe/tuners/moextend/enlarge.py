"""Merging: makes a plain model of transformers whose experts and routers are larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...pretrained_moe import COUNT_NAMES, find_moe_blocks, per_expert_tensors
from .experts import full_weights
from .layer import MoExtendExperts, MoExtendRouter


def _extended(model: nn.Module, kind: type[Any]) -> dict[int, Any]:
    return {module.block.layer: module for module in model.modules() if isinstance(module, kind)}


def check_enlargeable(model: nn.Module, adapter_names: list[str], *, safe_merge: bool = False) -> None:
    """Raise `ValueError`, before anything is changed, unless the adapters can become part of a plain model."""
    blocks, refused = find_moe_blocks(model)
    routers = _extended(model, MoExtendRouter)
    counts = {
        layer: sum(routers[layer].num_new.get(name, 0) for name in adapter_names) if layer in routers else 0
        for layer in blocks
    }
    problems = []
    if len(set(counts.values())) > 1 or refused:
        problems.append(
            f"layers differ in their new experts ({counts}), and a configuration of transformers has one number of "
            "experts for all layers."
        )
    for layer, router in routers.items():
        for name in adapter_names:
            if name in router.moextend_calibration and not router.moextend_calibration[name].is_identity:
                problems.append(f"layer {layer} has a trained calibration, which no model of transformers has.")
            gate = router.moextend_gate[name] if name in router.moextend_gate else None
            if gate is not None and gate.offset is not None and "bias" not in gate.names and bool(gate.offset.any()):
                problems.append(
                    f"layer {layer} has an offset of copy_guarded, which a router without a bias has no place for."
                )
    for module in model.modules() if safe_merge else ():
        if isinstance(module, MoExtendRouter | MoExtendExperts):
            own = {n: p for n, p in module.named_parameters() if "moextend_" in n}
            problems += [f"{n} is not finite." for n, p in own.items() if not torch.isfinite(p).all()]
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:5])
        raise ValueError(
            f"{adapter_names} cannot be merged into a plain model:{shown}\nKeep the adapter, which every path of PEFT "
            "loads; or, to drop it, use unload()."
        )


def enlarge(model: nn.Module, adapter_names: list[str]) -> None:
    """Write new experts and rows behind the old ones, in the modules of the base model, and count them everywhere."""
    num_experts = num_new = 0
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, MoExtendRouter | MoExtendExperts):
                continue
            names = [name for name in adapter_names if name in module.num_new]
            base = module.base_layer
            if isinstance(module, MoExtendExperts):
                for name, parameter in list(base.named_parameters(recurse=False)):
                    new = [full_weights(module.moextend_experts[adapter])[name] for adapter in names]
                    _put(base, name, torch.cat([parameter, *(entry.to(parameter.dtype) for entry in new)]))
            else:
                num_experts, num_new = module.block.num_experts, sum(module.num_new[name] for name in names)
                _enlarge_router(module, names)
                if module.block.correction is not None:
                    owner, _, own = module.block.correction.rpartition(".")
                    gates = [module.moextend_gate[name] for name in names]
                    block = model.get_submodule(owner)
                    _put(block, own, torch.cat([getattr(block, own), *(gate.correction for gate in gates)]))
    if num_new:
        _count(model, num_experts, num_experts + num_new)


def _enlarge_router(router: MoExtendRouter, names: list[str]) -> None:
    base = router.base_layer
    gates = [router.moextend_gate[name] for name in names]
    for name, (tensor, axis) in per_expert_tensors(base, router.block.num_experts).items():
        rows = [
            gate()[name] + gate.offset if name == "bias" and gate.offset is not None else gate()[name]
            for gate in gates
        ]
        _put(base, name, torch.cat([tensor, *(entry.to(tensor.dtype) for entry in rows)], dim=axis))


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, own = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if own in owner._parameters:
        owner._parameters[own] = nn.Parameter(value, requires_grad=owner._parameters[own].requires_grad)  # type: ignore[union-attr]
    else:
        owner._buffers[own] = value


def _count(model: nn.Module, before: int, after: int) -> None:
    """Tell the modules that count experts, and the configurations."""
    blocks = {block.name for block in find_moe_blocks(model)[0].values()}
    configs = []
    for name, module in model.named_modules():
        is_near = name in blocks or any(name.startswith(f"{block}.") for block in blocks) or hasattr(module, "config")
        for count in COUNT_NAMES if is_near else ():
            if module.__dict__.get(count) == before:
                module.__dict__[count] = after
        config = getattr(module, "config", None)
        if config is not None and not any(config is known for known in configs):
            configs.append(config)
    for config in configs:
        for count in COUNT_NAMES:
            if config.__dict__.get(count) == before:
                setattr(config, count, after)
