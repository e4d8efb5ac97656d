"""Pads: experts that are never chosen, so that layers with different numbers of new experts make one plain model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ...foreign_moe import MoeBlock, base_of, gate_weight_name, num_groups, per_expert_tensors, read_routing
from ...foreign_moe.routers import _counting, in_groups, places
from .layer import MoExtendRouter


LOWEST = -3e4
"""what a pad has where a router adds something for each expert; finite in every floating-point type"""
NUM_TRIALS = 512

PadRequest = bool | Iterable[Mapping[str, Any]]
"""`pad_experts` of `merge_and_unload`: whether to pad; or batches, to pad and to measure on"""


@dataclass(frozen=True)
class MergedRouter:
    """What a router consists of once new rows stand behind the old ones, of each group where there are some.

    Args:
        block (`MoeBlock`): where it is.
        weight_name (`str`): name of its matrix.
        tensors (`dict[str, tuple[torch.Tensor, int]]`): everything with an entry for each expert, and on which axis.
        correction (`torch.Tensor` of shape `(E + N,)`, *optional*): what the block hands to it.
        groups (`int`): groups of experts that it chooses from first.
        places (`torch.Tensor` of shape `(E + N,)`, int64): where each expert stands, which the adapter numbers after the
            old ones.
    """

    block: MoeBlock
    weight_name: str
    tensors: dict[str, tuple[torch.Tensor, int]]
    correction: torch.Tensor | None
    groups: int
    places: torch.Tensor

    @property
    def num_experts(self) -> int:
        """Old and new ones (E + N)."""
        return self.weight.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """`(E + N, D)`."""
        return self.tensors[self.weight_name][0]


@torch.no_grad()
def merged_router(model: nn.Module, block: MoeBlock, adapter_names: list[str]) -> MergedRouter:
    """The tensors of a router with the rows of these adapters; the router is only read."""
    layer = model.get_submodule(block.router)
    base = base_of(layer)
    gates = []
    if isinstance(layer, MoExtendRouter):
        gates = [layer.moextend_gate[name] for name in adapter_names if name in layer.num_new]
    tensors = {}
    for name, (tensor, axis) in per_expert_tensors(base, block.num_experts).items():
        rows = [
            gate()[name] + gate.offset if name == "bias" and gate.offset is not None else gate()[name]
            for gate in gates
        ]
        tensors[name] = (in_groups([tensor, *(entry.to(tensor) for entry in rows)], axis, num_groups(base)), axis)
    correction = None
    if block.correction is not None:
        owner, _, own = block.correction.rpartition(".")
        correction = getattr(model.get_submodule(owner), own)
        correction = in_groups([correction, *(gate.correction.to(correction) for gate in gates)], 0, num_groups(base))
    weight_name = gate_weight_name(base, block.num_experts)
    assert weight_name is not None
    counts = [block.num_experts, *(gate()[weight_name].shape[0] for gate in gates)]
    place = places(counts, num_groups(base))
    return MergedRouter(block, weight_name, tensors, correction, num_groups(base), place)


@dataclass(frozen=True)
class Pads:
    """The pads of one layer. They stand behind the experts of each group, so that no expert changes its group.

    Args:
        num (`int`): how many (P), a multiple of `groups`.
        groups (`int`): groups of experts that the router chooses from first.
        row (`torch.Tensor` of shape `(D,)`, *optional*): their row of the matrix; by default 0.
        source (`int`, *optional*): they are copies of this expert in all; by default their weights are 0, and everything
            that the router adds for each expert is [`LOWEST`].
    """

    num: int
    groups: int
    row: torch.Tensor | None = None
    source: int | None = None

    def in_router(self, tensor: torch.Tensor, axis: int, *, is_matrix: bool) -> torch.Tensor:
        """`tensor` of a router, with entries for the pads along `axis`."""
        shape = [self.num if i == axis else size for i, size in enumerate(tensor.shape)]
        if self.source is not None:
            pads = self._copies(tensor, axis)
        elif not is_matrix:
            pads = tensor.new_full(shape, LOWEST)
        else:
            pads = tensor.new_zeros(shape) if self.row is None else self.row.to(tensor).expand(shape)
        return self._inserted(tensor, pads, axis)

    def in_experts(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(E + N, ...)` → `(E + N + P, ...)`."""
        pads = tensor.new_zeros(self.num, *tensor.shape[1:]) if self.source is None else self._copies(tensor, 0)
        return self._inserted(tensor, pads, 0)

    def places(self, num_experts: int) -> torch.Tensor:
        """`(E + N,)`, int64: where each expert stands among the pads."""
        return self._inserted(torch.ones(num_experts), torch.zeros(self.num), 0).nonzero().squeeze(-1)

    def _copies(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        assert self.source is not None
        return tensor.index_select(axis, torch.full((self.num,), self.source, device=tensor.device))

    def _inserted(self, tensor: torch.Tensor, pads: torch.Tensor, axis: int) -> torch.Tensor:
        pairs = zip(tensor.chunk(self.groups, axis), pads.chunk(self.groups, axis), strict=True)
        return torch.cat([part for pair in pairs for part in pair], dim=axis)


def exact_pads(router: nn.Module, merged: MergedRouter, num: int) -> Pads | None:
    """Pads that change no output whatever the input is, or `None` where there are none.

    Tried on made-up numbers: pads with [`LOWEST`] in everything that is added for each expert; copies of expert 0, between
    which and the original a router that chooses one expert and gives it a fixed weight may decide as it likes.

    Args:
        router (`nn.Module`): of the base model; it is left as it was.
        merged (`MergedRouter`): its tensors after merging.
        num (`int`): how many pads (P).
    """
    for pads in (Pads(num, merged.groups), Pads(num, merged.groups, source=0)):
        if _is_exact(router, merged, pads):
            return pads
    return None


@torch.no_grad()
def _is_exact(router: nn.Module, merged: MergedRouter, pads: Pads) -> bool:
    generator = torch.Generator().manual_seed(0)

    def made_up(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(tensor.shape, generator=generator)

    width = merged.weight.shape[-1]
    before = {n: t.detach().cpu().float() for n, t in [*router.named_parameters(), *router.named_buffers()]}
    after = dict(before)
    for name, (tensor, axis) in merged.tensors.items():
        is_matrix = name == merged.weight_name
        before[name] = made_up(tensor, 2 * width**-0.5 if is_matrix else 0.1)
        after[name] = pads.in_router(before[name], axis, is_matrix=is_matrix)
    x = made_up(torch.empty(NUM_TRIALS, width), 1.0)
    num_experts = merged.num_experts
    corrections = [() if merged.correction is None else (made_up(merged.correction, 0.1),)]
    corrections.append(tuple(pads.in_router(entry, 0, is_matrix=False) for entry in corrections[0]))
    found = [
        _weights_of_experts(router, merged.block, tensors, x, *correction, num_experts=count)
        for tensors, correction, count in zip(
            (before, after), corrections, (num_experts, num_experts + pads.num), strict=True
        )
    ]
    if found[0] is None or found[1] is None:
        return False
    expected, padded = found
    places = pads.places(num_experts)
    kept = padded[:, places]
    of_pads = padded.sum(dim=-1) - kept.sum(dim=-1)
    if pads.source is not None:
        kept[:, pads.source] += of_pads
        of_pads = torch.zeros_like(of_pads)
    return not of_pads.any() and torch.allclose(kept, expected, rtol=1e-4, atol=1e-6)


def _weights_of_experts(
    router: nn.Module,
    block: MoeBlock,
    tensors: dict[str, torch.Tensor],
    x: torch.Tensor,
    *corrections: torch.Tensor,
    num_experts: int,
) -> torch.Tensor | None:
    """`(T, num_experts)`: the weight that each expert gets, 0 where it is not chosen; `None` if the router fails."""
    was_training = router.training
    router.eval()
    try:
        with _counting(router, block.num_experts, num_experts - block.num_experts, 0, 0):
            try:
                output = functional_call(router, tensors, (x, *corrections))
            except ValueError:  # some read the shape of a batch
                output = functional_call(router, tensors, (x[None], *corrections))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    finally:
        router.train(was_training)
    routing = read_routing(output, num_experts)
    if isinstance(routing, str):
        return None
    weights, index = (entry.reshape(len(x), -1) for entry in (routing.top_k_weights.float(), routing.top_k_index))
    return torch.zeros(len(x), num_experts).scatter_add(1, index, weights)
