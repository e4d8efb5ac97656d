"""Merging: makes a plain model of transformers whose experts and routers are larger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...foreign_moe import COUNT_NAMES, MoeBlock, base_of, find_moe_blocks
from ...foreign_moe.routers import in_groups
from .experts import full_weights
from .layer import MoExtendExperts, MoExtendRouter
from .pad_direction import measure_rows
from .padding import PadRequest, Pads, exact_pads, merged_router


COUNTS_BY_LAYER = "num_experts_by_layer"
"""a configuration that has this property takes a list in `num_experts`, one number for each mixture"""


def _routers(model: nn.Module) -> dict[int, MoExtendRouter]:
    return {module.block.layer: module for module in model.modules() if isinstance(module, MoExtendRouter)}


def _num_new(model: nn.Module, blocks: Mapping[int, MoeBlock], adapter_names: list[str]) -> dict[int, int]:
    routers = _routers(model)
    return {
        layer: sum(routers[layer].num_new.get(name, 0) for name in adapter_names) if layer in routers else 0
        for layer in blocks
    }


def _configs(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not any(config is known for known in found):
            found.append(config)
    return found


def check_enlargeable(
    model: nn.Module, adapter_names: list[str], *, safe_merge: bool = False, is_padded: bool = False
) -> dict[int, int]:
    """Raise `ValueError`, before anything is changed, unless the adapters can become part of a plain model.

    Args:
        model (`nn.Module`): the base model with the adapters in it.
        adapter_names (`list[str]`): what will be merged.
        safe_merge (`bool`): also look for values that are not finite.
        is_padded (`bool`): whether layers may be filled up with pads.

    Returns:
        `dict[int, int]`: layer → pads that it needs, where it needs some.
    """
    blocks, refused = find_moe_blocks(model)
    counts = _num_new(model, blocks, adapter_names)
    problems = [f"a mixture of experts cannot be enlarged: {reason}" for reason in refused]
    num_pads = {}
    if not any(hasattr(config, COUNTS_BY_LAYER) for config in _configs(model)):
        num_pads = {
            layer: max(counts.values()) - count for layer, count in counts.items() if count < max(counts.values())
        }
    if num_pads and not is_padded:
        problems.append(
            f"layers differ in their new experts ({counts}), and a configuration of transformers has one number of "
            "experts for all layers. Fill up the others with experts that are never chosen: "
            "merge_and_unload(pad_experts=True)."
        )
    for layer, router in _routers(model).items():
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
            own = {n: p for n, p in module.named_parameters() if n.startswith("moextend_")}
            problems += [
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {n} is not finite."
                for n, p in own.items()
                if (name := n.split(".")[1]) in adapter_names and not torch.isfinite(p).all()
            ]
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:5])
        raise ValueError(
            f"{adapter_names} cannot be merged into a plain model:{shown}\nElse keep the adapter, which every path of PEFT "
            "loads; or, to drop it, use unload()."
        )
    return num_pads


def plan_pads(
    model: nn.Module, adapter_names: list[str], num_pads: dict[int, int], pad_experts: PadRequest
) -> dict[int, Pads]:
    """How each of these layers is filled up; nothing is changed yet.

    Args:
        model (`nn.Module`): the base model, with the adapters active that will be merged.
        adapter_names (`list[str]`): their names.
        num_pads (`dict[int, int]`): layer → pads that it needs.
        pad_experts (`bool` or `Iterable[Mapping[str, Any]]`): see [`MoExtendModel.merge_and_unload`].

    Raises:
        ValueError: there are no pads that are never chosen, or only on measured data, and `pad_experts` has none.
    """
    blocks, _ = find_moe_blocks(model)
    plans: dict[int, Pads] = {}
    measured = {}
    for layer, num in num_pads.items():
        merged = merged_router(model, blocks[layer], adapter_names)
        pads = exact_pads(base_of(model.get_submodule(blocks[layer].router)), merged, num)
        if pads is None:
            measured[layer] = merged
        else:
            plans[layer] = pads
    if measured and isinstance(pad_experts, bool):
        names = [merged.block.router for merged in measured.values()]
        raise ValueError(
            f"{adapter_names} cannot be merged into a plain model with pad_experts=True: {', '.join(names)} add nothing to "
            "the logit of an expert that does not depend on the input, or weigh experts by more than that, so no row lies "
            "below the chosen ones for every input. Pass batches of model inputs instead, "
            "merge_and_unload(pad_experts=[batch, ...]): they are run once, and pads get a row that is never chosen on "
            "them. Or keep the adapter."
        )
    if measured:
        for layer, row in measure_rows(model, measured, pad_experts).items():  # type: ignore[arg-type]
            plans[layer] = Pads(num_pads[layer], measured[layer].groups, row=row)
    return plans


@torch.no_grad()
def enlarge(model: nn.Module, adapter_names: list[str], pads: dict[int, Pads]) -> None:
    """Write new experts, rows and pads behind the old ones, in the modules of the base model, and count them everywhere."""
    blocks, _ = find_moe_blocks(model)
    after = {}
    for layer, block in blocks.items():
        merged = merged_router(model, block, adapter_names)
        pad = pads.get(layer)
        after[layer] = merged.num_experts + (pad.num if pad else 0)
        if after[layer] == block.num_experts:
            continue
        router, experts = (model.get_submodule(name) for name in (block.router, block.experts))
        for name, (tensor, axis) in merged.tensors.items():
            is_matrix = name == merged.weight_name
            _put(base_of(router), name, pad.in_router(tensor, axis, is_matrix=is_matrix) if pad else tensor)
        if merged.correction is not None:
            assert block.correction is not None
            value = pad.in_router(merged.correction, 0, is_matrix=False) if pad else merged.correction
            _put(model, block.correction, value)
        names = [name for name in adapter_names if isinstance(experts, MoExtendExperts) and name in experts.num_new]
        for name, parameter in list(base_of(experts).named_parameters(recurse=False)):
            new = [full_weights(experts.moextend_experts[adapter])[name] for adapter in names]  # type: ignore[index]
            stacked = in_groups([parameter, *(entry.to(parameter) for entry in new)], 0, merged.groups)
            _put(base_of(experts), name, pad.in_experts(stacked) if pad else stacked)
        _count_in_block(model, block, after[layer])
    _count_in_configs(model, {layer: block.num_experts for layer, block in blocks.items()}, after)


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, own = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if own in owner._parameters:
        owner._parameters[own] = nn.Parameter(value, requires_grad=owner._parameters[own].requires_grad)  # type: ignore[union-attr]
    else:
        owner._buffers[own] = value


def _count_in_block(model: nn.Module, block: MoeBlock, after: int) -> None:
    """Tell the block, its router and its experts."""
    modules = [model.get_submodule(block.name)]
    for name in (block.router, block.experts):
        modules += model.get_submodule(name).modules()
    for module in modules:
        for count in COUNT_NAMES:
            if module.__dict__.get(count) == block.num_experts:
                module.__dict__[count] = after


def _count_in_configs(model: nn.Module, before: dict[int, int], after: dict[int, int]) -> None:
    """Tell the configurations, and the models that keep a number of theirs."""
    by_layer = [config for config in _configs(model) if hasattr(config, COUNTS_BY_LAYER)]
    for config in by_layer:
        counts = [after[layer] for layer in getattr(config, COUNTS_BY_LAYER)]
        is_one = not isinstance(config.num_experts, list | tuple) and len(set(counts)) == 1
        config.num_experts = counts[0] if is_one else counts
    if by_layer:
        return
    (old,), (new,) = set(before.values()), set(after.values())
    for config in _configs(model):
        for count in COUNT_NAMES:
            if config.__dict__.get(count) == old:
                setattr(config, count, new)
    for module in model.modules():
        for count in COUNT_NAMES if hasattr(module, "config") else ():
            if module.__dict__.get(count) == old:
                module.__dict__[count] = new
