"""Runs the router of a family with further rows by a shallow copy of it, which costs less than `functional_call`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...foreign_moe import COUNT_NAMES, gate_weight_name, num_groups, per_expert_tensors, route
from ...foreign_moe.blocks import WIDTH_NAMES
from ...foreign_moe.routers import lengthen, old_first


class LargerRouter:
    """Calls a router with longer tensors, made anew in each call, so that nothing can be out of date.

    Args:
        router (`nn.Module`): of the base model, for E experts; only its structure is read here.
        num_experts (`int`): E.
    """

    def __init__(self, router: nn.Module, num_experts: int) -> None:
        self.num_experts = num_experts
        self.groups = num_groups(router)
        self.weight_name = gate_weight_name(router, num_experts)
        self.axes = {name: axis for name, (_, axis) in per_expert_tensors(router, num_experts).items()}
        width = None if self.weight_name is None else router.get_parameter(self.weight_name).shape[-1]
        modules = list(router.named_modules())
        self.counts = {name: _attributes(module, COUNT_NAMES, num_experts) for name, module in modules}
        self.widths = {name: _attributes(module, WIDTH_NAMES, width) for name, module in modules}

    def __call__(
        self,
        router: nn.Module,
        rows: list[dict[str, torch.Tensor]],
        hidden_states: torch.Tensor,
        *args: Any,
        offset: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What `router` returns for E + N experts; arguments as in [`~peft_moe.foreign_moe.route`], which runs where a
        copy cannot: in a compiled model, and where somebody has replaced `forward` (offloading by accelerate)."""
        if torch.compiler.is_compiling() or _has_other_forward(router):
            return route(router, rows, hidden_states, *args, num_experts=self.num_experts, offset=offset, **kwargs)
        assert self.weight_name is not None
        tensors = {name: (_tensor(router, name), axis) for name, axis in self.axes.items()}
        longer, hidden_states, counts = lengthen(
            tensors, self.weight_name, rows, hidden_states, groups=self.groups, offset=offset
        )
        width = None if offset is None else hidden_states.shape[-1]
        output = self._copied(router, "", longer, sum(counts), width)(hidden_states, *args, **kwargs)
        return old_first(output, counts, self.groups)

    def weight_of(self, router: nn.Module) -> torch.Tensor:
        """The matrix `(E, D)` of `router`."""
        assert self.weight_name is not None
        return _tensor(router, self.weight_name)

    def _copied(
        self, module: nn.Module, name: str, tensors: dict[str, torch.Tensor], num_experts: int, width: int | None
    ) -> nn.Module:
        """A copy that shares everything with `module` but for these tensors and sizes."""
        state = dict(module.__dict__)
        state.update(dict.fromkeys(self.counts[name], num_experts))
        if width is not None:
            state.update(dict.fromkeys(self.widths[name], width))
        prefix = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers"):
            if state[kind]:
                state[kind] = {own: tensors.get(prefix + own, tensor) for own, tensor in state[kind].items()}
                for own in state[kind]:
                    state.pop(own, None)  # FSDP1 leaves what it gathers in both places, and this one would win
        if state["_modules"]:
            state["_modules"] = {
                own: None if child is None else self._copied(child, prefix + own, tensors, num_experts, width)
                for own, child in state["_modules"].items()
            }
        copied = object.__new__(type(module))
        object.__setattr__(copied, "__dict__", state)
        return copied


def _attributes(module: nn.Module, names: tuple[str, ...], value: int | None) -> list[str]:
    return [name for name in names if module.__dict__.get(name) == value and value is not None]


def _has_other_forward(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return True
    return any(child is not None and _has_other_forward(child) for child in module._modules.values())


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    *path, own = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters[own] if own in module._parameters else module._buffers[own]
    assert found is not None
    return found
