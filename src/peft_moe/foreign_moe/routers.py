"""Runs a family's own router with more rows than it was made with; no routing is written again here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import pad

from .blocks import COUNT_NAMES, WIDTH_NAMES, MoeBlock, gate_weight_name, num_groups, per_expert_tensors


NUM_PROBES = 16


@dataclass(frozen=True)
class Routing:
    """What a router of transformers returned, read by type and shape.

    Args:
        output (`tuple`): all of it.
        router_logits (`torch.Tensor` of shape `(T, E)`)
        top_k_weights (`torch.Tensor` of shape `(T, K)`)
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64)
    """

    output: tuple[Any, ...]
    router_logits: torch.Tensor
    top_k_weights: torch.Tensor
    top_k_index: torch.Tensor

    def with_weights(self, top_k_weights: torch.Tensor) -> tuple[Any, ...]:
        """The output with other weights."""
        return tuple(top_k_weights if entry is self.top_k_weights else entry for entry in self.output)


def read_routing(output: Any, num_experts: int, *, is_probability: bool = False) -> Routing | str:
    """Find logits, weights and choices in what a router returned, or say why they are not there.

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
    return Routing(output, logits, weights, index)


def _described(output: Any) -> str:
    if not isinstance(output, tuple):
        return type(output).__name__
    parts = [
        f"{str(e.dtype)[6:]} {tuple(e.shape)}" if isinstance(e, torch.Tensor) else type(e).__name__ for e in output
    ]
    return f"({', '.join(parts)})"


@contextmanager
def _counting(router: nn.Module, num_experts: int, num_new: int, width: int, extra_width: int) -> Iterator[None]:
    """Within this context the router believes in more experts, and perhaps in a wider input."""
    before = []
    for module in router.modules():
        for names, value, extra in ((COUNT_NAMES, num_experts, num_new), (WIDTH_NAMES, width, extra_width)):
            for name in names:
                if extra and module.__dict__.get(name) == value:
                    before.append((module, name, value))
                    module.__dict__[name] = value + extra
    try:
        yield
    finally:
        for module, name, value in before:
            module.__dict__[name] = value


def in_groups(parts: list[torch.Tensor], axis: int, groups: int) -> torch.Tensor:
    """Entries of old and new experts, old ones first within each group, so that no expert changes its group.

    Args:
        parts (`list[torch.Tensor]`): those of the old experts, then those of each adapter; along `axis` each a multiple of
            `groups` long. The i-th of N new experts comes into group `⌊i · groups / N⌋`.
        axis (`int`): that of the experts.
        groups (`int`): from which the router chooses some first; with 1 the parts just follow each other.
    """
    if groups == 1:
        return torch.cat(parts, dim=axis)
    chunks = [part.chunk(groups, axis) for part in parts]
    return torch.cat([chunk for group in zip(*chunks, strict=True) for chunk in group], dim=axis)


def places(counts: list[int], groups: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """`(E + N,)`, int64: where each expert stands in the order of [`in_groups`], for parts of these lengths."""
    numbers = torch.arange(sum(counts), device=device)
    return in_groups(list(numbers.split(counts)), 0, groups).argsort()


def old_first(output: Any, counts: list[int], groups: int) -> Any:
    """What a router returned for the order of [`in_groups`], in the order old experts, first adapter, second, …"""
    if groups == 1:
        return output
    routing = read_routing(output, sum(counts))
    if isinstance(routing, str):
        return output
    place = places(counts, groups, device=routing.top_k_index.device)
    logits = routing.router_logits.index_select(-1, place)
    index = place.argsort()[routing.top_k_index]
    replaced = {id(routing.router_logits): logits, id(routing.top_k_index): index}
    return tuple(replaced.get(id(entry), entry) for entry in output)


def lengthen(
    tensors: dict[str, tuple[torch.Tensor, int]],
    weight_name: str,
    rows: list[dict[str, torch.Tensor]],
    hidden_states: torch.Tensor,
    *,
    groups: int,
    offset: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[int]]:
    """What a router needs to score further experts.

    Args:
        tensors (`dict[str, tuple[torch.Tensor, int]]`): everything in it with an entry for each expert, and on which axis.
        weight_name (`str`): name of its matrix `(E, D)`.
        rows (`list[dict[str, torch.Tensor]]`): of each adapter, what to add to each tensor, by name.
        hidden_states (`torch.Tensor` of shape `(..., D)`)
        groups (`int`): from which the router chooses some first.
        offset (`torch.Tensor` of shape `(N,)`, *optional*): added to the logits of the N new experts.

    Returns:
        The longer tensors, the hidden states to call it with, and the numbers of old experts and of those of each adapter.
        With an offset the matrix and the hidden states are one column wider.
    """
    longer = {
        name: in_groups([tensor, *(entry[name].to(tensor.dtype) for entry in rows)], axis, groups)
        for name, (tensor, axis) in tensors.items()
    }
    counts = [tensors[weight_name][0].shape[0], *(entry[weight_name].shape[0] for entry in rows)]
    if offset is not None:
        # a constant input whose weight is the offset: the router adds it by itself, before it chooses
        column = pad(offset, (counts[0], 0))
        if groups > 1:
            column = in_groups(list(column.split(counts)), 0, groups)
        weight = longer[weight_name]
        longer[weight_name] = torch.cat([weight, column.to(weight.dtype).unsqueeze(-1)], dim=-1)
        hidden_states = pad(hidden_states, (0, 1), value=1.0)
    return longer, hidden_states, counts


def route(
    router: nn.Module,
    rows: list[dict[str, torch.Tensor]],
    hidden_states: torch.Tensor,
    *args: Any,
    num_experts: int,
    offset: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Call a router with further experts.

    Where it chooses groups of experts first, new ones join the groups (see [`in_groups`]); what comes back numbers them
    after the old ones all the same. Other arguments with an entry for each expert have to come in the order of the groups.

    Args:
        router (`nn.Module`): of the base model, for E experts; it is left as it was.
        rows (`list[dict[str, torch.Tensor]]`): of each adapter, what to add to each tensor that has an entry for each
            expert, by name.
        hidden_states (`torch.Tensor` of shape `(..., D)`)
        num_experts (`int`): E.
        offset (`torch.Tensor` of shape `(N,)`, *optional*): added to the logits of the N new experts.
    """
    weight_name, groups = gate_weight_name(router, num_experts), num_groups(router)
    assert weight_name is not None
    tensors = per_expert_tensors(router, num_experts)
    width = hidden_states.shape[-1]
    longer, hidden_states, counts = lengthen(tensors, weight_name, rows, hidden_states, groups=groups, offset=offset)
    with _counting(router, num_experts, sum(counts[1:]), width, 0 if offset is None else 1):
        output = functional_call(router, longer, (hidden_states, *args), kwargs)
    return old_first(output, counts, groups)


def probe(
    router: nn.Module, block: MoeBlock, num_new: int, *, is_random: bool = False, has_offset: bool = False
) -> Routing | str:
    """Run a router with `num_new` further experts on made-up weights and inputs, or say why that fails.

    All of it is on the CPU and in float32, wherever the router is, and 0; with `is_random` the inputs, the matrix and scales
    are random. `has_offset` as in [`route`].
    """
    num_experts = block.num_experts
    groups = num_groups(router)
    if (num_experts + num_new) % groups:
        return (
            f"chooses among {groups} groups of equal size, which {num_experts} + {num_new} experts do not make. Choose "
            f"num_new_experts so that the sum is a multiple of {groups}"
        )
    generator = torch.Generator().manual_seed(0)
    weight_name = gate_weight_name(router, num_experts)
    made_up = {
        name: torch.zeros(tensor.shape) for name, tensor in [*router.named_parameters(), *router.named_buffers()]
    }
    assert weight_name is not None
    width = made_up[weight_name].shape[-1]
    x = torch.zeros(NUM_PROBES, width)
    if is_random:
        x.normal_(generator=generator)
        made_up[weight_name].normal_(std=width**-0.5, generator=generator)
    for name, (tensor, axis) in per_expert_tensors(router, num_experts).items():
        shape = [num_new if i == axis else size for i, size in enumerate(tensor.shape)]
        made_up[name] = torch.cat([made_up[name], torch.zeros(shape)], dim=axis)
    scales = [name for name, p in router.named_parameters() if p.dim() == 1 and not name.endswith("bias")]
    for name in scales if is_random else ():
        made_up[name].uniform_(0.5, 1.5, generator=generator)
    if has_offset:
        x = torch.zeros(NUM_PROBES, width + 1)
        made_up[weight_name] = torch.zeros(num_experts + num_new, width + 1)
    corrections = () if block.correction is None else (torch.zeros(num_experts + num_new),)
    was_training = router.training
    router.eval()
    try:
        with torch.no_grad(), _counting(router, num_experts, num_new, width, int(has_offset)):
            try:
                output = functional_call(router, made_up, (x, *corrections))
            except ValueError:  # some read the shape of a batch
                output = functional_call(router, made_up, (x[None], *corrections))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"cannot run with {num_experts} + {num_new} experts: {str(error).splitlines()[0]}"
    finally:
        router.train(was_training)
    return read_routing(output, num_experts + num_new)


def returns_probabilities(router: nn.Module, block: MoeBlock) -> bool:
    """Whether a router returns probabilities where others return logits, as measured on random numbers."""
    routing = probe(router, block, num_groups(router), is_random=True)
    if isinstance(routing, str):
        return False
    sums = routing.router_logits.float().sum(dim=-1)
    return bool((routing.router_logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
