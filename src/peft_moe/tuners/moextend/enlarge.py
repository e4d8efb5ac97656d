"""Merging: makes a plain model of transformers whose experts and routers are larger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...foreign_moe import (
    COUNT_NAMES,
    LOWEST,
    MoeBlock,
    Pads,
    base_of,
    configs_of,
    find_moe_blocks,
    gate_weight_name,
    in_groups,
    num_groups,
    per_expert_tensors,
    probe,
)
from .experts import MoExtendExperts, full_weights
from .router import MoExtendRouter


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


@dataclass(frozen=True)
class LayerPads:
    """What fills up one layer.

    Args:
        num (`int`): how many pads (P), a multiple of the number of groups of experts.
        kind (`Pads`): what they are.
    """

    num: int
    kind: Pads


def check_enlargeable(
    model: nn.Module, adapter_names: list[str], *, safe_merge: bool = False, pad_experts: bool = False
) -> dict[int, LayerPads]:
    """Raise `ValueError`, before anything is changed, unless the adapters can become part of a plain model.

    Args:
        model (`nn.Module`): the base model with the adapters in it.
        adapter_names (`list[str]`): what will be merged.
        safe_merge (`bool`): also look for values that are not finite.
        pad_experts (`bool`): whether layers may be filled up with pads.

    Returns:
        `dict[int, LayerPads]`: of the layers that need some.
    """
    blocks, refused = find_moe_blocks(model)
    counts = _num_new(model, blocks, adapter_names)
    problems = [f"a mixture of experts cannot be enlarged: {reason}" for reason in refused]
    pads: dict[int, LayerPads] = {}
    takes_any = any(hasattr(config, COUNTS_BY_LAYER) for config in configs_of(model))
    top = max(counts.values(), default=0)
    num_pads = {layer: top - count for layer, count in counts.items() if count < top and not takes_any}
    if num_pads and pad_experts:
        for layer, num in num_pads.items():
            kind = probe(base_of(model.get_submodule(blocks[layer].router)), blocks[layer]).pads
            if kind is not None:
                pads[layer] = LayerPads(num, kind)
        if without := [blocks[layer].router for layer in num_pads if layer not in pads]:
            problems.append(
                f"{', '.join(without)} add nothing to the logit of an expert that does not depend on the input, or "
                "weigh experts by more than that: a pad would be chosen for some inputs. Give all layers the same "
                "number of new experts."
            )
    elif num_pads:
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
            f"{adapter_names} cannot be merged into a plain model:{shown}\nElse keep the adapter, which every path of "
            "PEFT loads; or, to drop it, use unload()."
        )
    return pads


@torch.no_grad()
def enlarge(model: nn.Module, adapter_names: list[str], pads: Mapping[int, LayerPads]) -> None:
    """Write new experts, rows and pads behind the old ones, in the modules of the base model; count them
    everywhere."""
    blocks, _ = find_moe_blocks(model)
    after = {}
    for layer, block in blocks.items():
        of_layer = pads.get(layer)
        num_new = _enlarge_block(model, block, adapter_names, of_layer)
        after[layer] = block.num_experts + num_new + (of_layer.num if of_layer else 0)
        _count_in_block(model, block, after[layer])
    _count_in_configs(model, {layer: block.num_experts for layer, block in blocks.items()}, after)


def _enlarge_block(model: nn.Module, block: MoeBlock, adapter_names: list[str], pads: LayerPads | None) -> int:
    """Make the tensors of one block larger; returns how many experts the adapters bring (N)."""
    layer, experts = model.get_submodule(block.router), model.get_submodule(block.experts)
    router = base_of(layer)
    groups = num_groups(router)
    names = [name for name in adapter_names if isinstance(layer, MoExtendRouter) and name in layer.num_new]
    if not names and pads is None:
        return 0
    gates = [layer.moextend_gate[name] for name in names]  # type: ignore[index]

    def stacked(old: torch.Tensor, new: list[torch.Tensor], axis: int, value: float) -> torch.Tensor:
        tensor = in_groups([old, *(entry.to(old) for entry in new)], axis, groups)
        return tensor if pads is None else pads.kind.fill(tensor, axis, pads.num, groups, value=value)

    weight_name = gate_weight_name(router, block.num_experts)
    for name, (tensor, axis) in per_expert_tensors(router, block.num_experts).items():
        rows = [
            gate()[name] + gate.offset if name == "bias" and gate.offset is not None else gate()[name]
            for gate in gates
        ]
        _put(router, name, stacked(tensor, rows, axis, 0.0 if name == weight_name else LOWEST))
    correction = block.correction_in(model)
    if correction is not None:
        assert block.correction is not None
        _put(model, block.correction, stacked(correction, [gate.correction for gate in gates], 0, LOWEST))
    for name, parameter in list(base_of(experts).named_parameters(recurse=False)):
        new = [full_weights(experts.moextend_experts[adapter])[name] for adapter in names]  # type: ignore[index]
        _put(base_of(experts), name, stacked(parameter, new, 0, 0.0))
    return sum(layer.num_new[name] for name in names)  # type: ignore[operator,index,misc]


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, own = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = getattr(owner, own)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, own, value)


def _count_in_block(model: nn.Module, block: MoeBlock, after: int) -> None:
    """Tell the block, its router and its experts."""
    modules = [model.get_submodule(block.name)]
    for name in (block.router, block.experts):
        modules += model.get_submodule(name).modules()
    _recount(modules, block.num_experts, after)


def _count_in_configs(model: nn.Module, before: dict[int, int], after: dict[int, int]) -> None:
    """Tell the configurations, and the models that keep a number of theirs."""
    by_layer = [config for config in configs_of(model) if hasattr(config, COUNTS_BY_LAYER)]
    for config in by_layer:
        counts = [after[layer] for layer in getattr(config, COUNTS_BY_LAYER)]
        is_one = not isinstance(config.num_experts, list | tuple) and len(set(counts)) == 1
        config.num_experts = counts[0] if is_one else counts
    if by_layer:
        return
    (old,), (new,) = set(before.values()), set(after.values())
    _recount([*configs_of(model), *(module for module in model.modules() if hasattr(module, "config"))], old, new)


def _recount(holders: Iterable[Any], old: int, new: int) -> None:
    for holder in holders:
        for count in COUNT_NAMES:
            if holder.__dict__.get(count) == old:
                setattr(holder, count, new)
