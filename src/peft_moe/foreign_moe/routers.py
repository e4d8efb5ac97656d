"""Runs a family's own router with more rows than it was made with; no routing is written again here."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..routing import RouterOutput
from .blocks import COUNT_NAMES, WIDTH_NAMES, gate_weight_name, num_groups, per_expert_tensors


def read_decision(output: Any, num_experts: int, *, is_probability: bool = False) -> RouterOutput | str:
    """Find logits, choices and weights by type and shape in what a router returned, or say why they are not there.

    With `is_probability` the first entry holds probabilities, and `router_logits` become their logarithm.
    """
    tensors = [entry for entry in output if isinstance(entry, torch.Tensor)] if isinstance(output, tuple) else []
    indices = [entry for entry in tensors if not entry.is_floating_point()]
    scores = [entry for entry in tensors if entry.is_floating_point()]
    if len(indices) != 1 or len(scores) != 2:
        return f"returns {_described(output)} instead of logits, weights and choices"
    index = indices[0]
    # logits come first, unless the shapes say that they do not
    is_reversed = scores[0].shape == index.shape and scores[1].shape != index.shape
    logits, weights = scores[::-1] if is_reversed else scores
    if logits.shape[-1] != num_experts or weights.shape != index.shape:
        return f"returns {_described(output)}, which is not a logit per expert ({num_experts}) and a weight per choice"
    if is_probability:
        logits = logits.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return RouterOutput(logits, index, weights)


def _described(output: Any) -> str:
    if not isinstance(output, tuple):
        return type(output).__name__
    parts = [
        f"{str(e.dtype)[6:]} {tuple(e.shape)}" if isinstance(e, torch.Tensor) else type(e).__name__ for e in output
    ]
    return f"({', '.join(parts)})"


def in_groups(parts: list[torch.Tensor], axis: int, groups: int) -> torch.Tensor:
    """Entries of old and new experts, old ones first within each group, so that no expert changes its group.

    Args:
        parts (`list[torch.Tensor]`): those of the old experts, then those of each adapter; along `axis` each a
            multiple of `groups` long. The i-th of N new experts comes into group `⌊i · groups / N⌋`.
        axis (`int`): that of the experts.
        groups (`int`): from which the router chooses some first; with 1 the parts just follow each other.
    """
    if groups == 1:
        return torch.cat(parts, dim=axis)
    chunks = [part.chunk(groups, axis) for part in parts]
    return torch.cat([chunk for group in zip(*chunks, strict=True) for chunk in group], dim=axis)


def _old_first(output: Any, counts: list[int], groups: int) -> Any:
    """What a router returned for the order of [`in_groups`], in the order old experts, first adapter, second, …"""
    decision = read_decision(output, sum(counts)) if groups > 1 else ""
    if isinstance(decision, str):
        return output
    numbers = torch.arange(sum(counts), device=decision.top_k_index.device)
    expert_at = in_groups(list(numbers.split(counts)), 0, groups)
    logits = decision.router_logits.index_select(-1, expert_at.argsort())
    replaced = {id(decision.router_logits): logits, id(decision.top_k_index): expert_at[decision.top_k_index]}
    return tuple(replaced.get(id(entry), entry) for entry in output)


class LargerRouter:
    """Calls a router with further rows, by a shallow copy that costs less than `functional_call`.

    The copy is made anew in each call, so that nothing in it can be out of date, and the router stays as it was.

    Args:
        router (`nn.Module`): of the base model, for E experts, with one matrix `(E, D)`; only its structure is read
            here.
        num_experts (`int`): E.
    """

    def __init__(self, router: nn.Module, num_experts: int) -> None:
        weight_name = gate_weight_name(router, num_experts)
        assert weight_name is not None
        self.num_experts = num_experts
        self.groups = num_groups(router)
        self.weight_name = weight_name
        self.axes = {name: axis for name, (_, axis) in per_expert_tensors(router, num_experts).items()}
        width = router.get_parameter(weight_name).shape[-1]
        modules = list(router.named_modules())
        self._counts = {name: _attributes(module, COUNT_NAMES, num_experts) for name, module in modules}
        self._widths = {name: _attributes(module, WIDTH_NAMES, width) for name, module in modules}

    def __call__(
        self,
        router: nn.Module,
        rows: list[dict[str, torch.Tensor]],
        hidden_states: torch.Tensor,
        *args: Any,
        offset: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What `router` returns for E + N experts.

        Where it chooses groups of experts first, new ones join the groups (see [`in_groups`]); what comes back numbers
        them after the old ones all the same. Other arguments with an entry for each expert have to come in the order
        of the groups.

        Args:
            router (`nn.Module`): the one that this was made for, or a copy of it.
            rows (`list[dict[str, torch.Tensor]]`): of each adapter, what to add to each tensor that has an entry for
                each expert, by name.
            hidden_states (`torch.Tensor` of shape `(..., D)`)
            offset (`torch.Tensor` of shape `(N,)`, *optional*): added to the logits of the N new experts.
        """
        longer = {}
        for name, axis in self.axes.items():
            tensor = _tensor(router, name)
            longer[name] = in_groups([tensor, *(entry[name].to(tensor.dtype) for entry in rows)], axis, self.groups)
        counts = [self.num_experts, *(entry[self.weight_name].shape[0] for entry in rows)]
        width = None
        if offset is not None:
            # a constant input whose weight is the offset: the router adds it by itself, before it chooses
            column = in_groups(list(pad(offset, (counts[0], 0)).split(counts)), 0, self.groups)
            weight = longer[self.weight_name]
            longer[self.weight_name] = torch.cat([weight, column.to(weight.dtype).unsqueeze(-1)], dim=-1)
            hidden_states = pad(hidden_states, (0, 1), value=1.0)
            width = hidden_states.shape[-1]
        larger = self.copied(router, longer, num_experts=sum(counts), width=width)
        return _old_first(larger(hidden_states, *args, **kwargs), counts, self.groups)

    def weight_of(self, router: nn.Module) -> torch.Tensor:
        """The matrix `(E, D)` of `router`."""
        return _tensor(router, self.weight_name)

    def copied(
        self,
        router: nn.Module,
        tensors: dict[str, torch.Tensor],
        *,
        num_experts: int,
        width: int | None = None,
        is_bare: bool = False,
    ) -> nn.Module:
        """A copy that shares everything with `router` but for these tensors and sizes.

        With `is_bare` it is in evaluation mode, and shares neither hooks nor a `forward` that somebody has put in
        place of the class's own.
        """
        return self._copied(router, "", tensors, num_experts, width, is_bare)

    def _copied(
        self,
        module: nn.Module,
        name: str,
        tensors: dict[str, torch.Tensor],
        num_experts: int,
        width: int | None,
        is_bare: bool,
    ) -> nn.Module:
        state = dict(module.__dict__)
        state.update(dict.fromkeys(self._counts[name], num_experts))
        if width is not None:
            state.update(dict.fromkeys(self._widths[name], width))
        prefix = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers"):
            if state[kind]:
                state[kind] = {own: tensors.get(prefix + own, tensor) for own, tensor in state[kind].items()}
                for own in state[kind]:
                    state.pop(own, None)  # FSDP1 leaves what it gathers in both places, and this one would win
        if state["_modules"]:
            state["_modules"] = {
                own: None if child is None else self._copied(child, prefix + own, tensors, num_experts, width, is_bare)
                for own, child in state["_modules"].items()
            }
        copied: nn.Module = object.__new__(type(module))
        state.pop("_compiled_call_impl", None)  # bound to the router, as a forward in its __dict__ is
        for own in ("forward", "_old_forward"):
            # a device map of accelerate puts a function that is bound to the router into the place of its forward
            if own in state and not is_bare:
                state[own] = _bound_to(copied, state[own], module)
            else:
                state.pop(own, None)
        if is_bare:
            state.update(training=False, _forward_hooks={}, _forward_pre_hooks={})
        object.__setattr__(copied, "__dict__", state)
        return copied


def _bound_to(copied: nn.Module, forward: Any, module: nn.Module) -> Any:
    """`forward`, which somebody has put in place of that of `module`, for a copy of it."""
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return types.MethodType(forward.__func__, copied)
    if isinstance(forward, functools.partial) and forward.args[:1] == (module,):
        return functools.partial(forward.func, copied, *forward.args[1:], **forward.keywords)
    raise RuntimeError(
        f"The forward of {type(module).__name__} was replaced by {forward!r}, which cannot run with the rows of new "
        "experts. Bind it to the router: router.forward = types.MethodType(function, router), or "
        "functools.partial(function, router)."
    )


def _attributes(module: nn.Module, names: tuple[str, ...], value: int) -> list[str]:
    return [name for name in names if module.__dict__.get(name) == value]


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    *path, own = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters[own] if own in module._parameters else module._buffers[own]
    assert found is not None
    return found
