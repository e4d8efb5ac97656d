"""The experts of an extended mixture: the base model's, and modules of the family's own class for the new ones."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ...foreign_moe import COUNT_NAMES, MoeBlock
from .config import MoExtendConfig
from .layer import MoExtendLayer


# what offloading, a device map and compile() leave on a module: all of it computes the module that it was made for
BOUND_NAMES = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


def empty_experts(base: nn.Module, num_new: int, *, device: torch.device | str | None = None) -> nn.Module:
    """A module like `base`, but for `num_new` experts and with parameters that are not filled.

    Layout, biases, activation and the choice of an implementation are those of the family. Settings are shared with
    `base`, so that `set_experts_implementation` reaches both.
    """
    experts = copy.copy(base)
    experts.__dict__ = dict(base.__dict__)
    for name in list(experts.__dict__):
        if name.endswith("_hooks") or "_hooks_" in name:
            experts.__dict__[name] = OrderedDict() if isinstance(experts.__dict__[name], OrderedDict) else None
    for name in BOUND_NAMES:
        experts.__dict__.pop(name, None)
    experts._modules = dict(base._modules)
    experts._buffers = dict(base._buffers)
    experts._parameters = {}
    count = next(iter(base._parameters.values())).shape[0]  # type: ignore[union-attr]
    for name in COUNT_NAMES:
        if experts.__dict__.get(name) == count:
            experts.__dict__[name] = num_new
    for name, parameter in base.named_parameters(recurse=False):
        shape = (num_new, *parameter.shape[1:])
        data = torch.empty(shape, dtype=parameter.dtype, device=device or parameter.device)
        experts.register_parameter(name, nn.Parameter(data))
    return experts


def copied_experts(base: nn.Module, sources: list[int]) -> nn.Module:
    """New experts as full FFNs, each a copy of its source."""
    experts = empty_experts(base, len(sources))
    with torch.no_grad():
        for name, parameter in experts.named_parameters(recurse=False):
            source = getattr(base, name)
            if not parameter.is_meta and not source.is_meta:
                parameter.copy_(source[sources])
    return experts


class LowRankExperts(nn.Module):
    """New experts as the frozen source plus `scaling · B A`; biases get a difference of their own size.

    Keys of a saved adapter, for each stacked parameter `name` `(E, rows, columns)` of the family: `name_A` `(N, R,
    columns)` and `name_B` `(N, rows, R)`; for each bias `name` `(E, rows)`: `name_delta` `(N, rows)`.

    Args:
        base (`nn.Module`): the experts of the base model; only read.
        sources (`list[int]`): which expert each new one differs from.
        r (`int`): rank (R).
        lora_alpha (`float`): the difference is scaled by `lora_alpha / r`.
    """

    def __init__(self, base: nn.Module, sources: list[int], *, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.sources = sources
        self.scaling = lora_alpha / r
        # in tuples, because they are no children: one belongs to the base model, the other has no values
        self._base = (base,)
        self._empty = (empty_experts(base, len(sources), device="meta"),)
        num_new = len(sources)
        for name, parameter in base.named_parameters(recurse=False):
            settings: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
            if parameter.dim() != 3:
                delta = torch.zeros(num_new, *parameter.shape[1:], **settings)
                self.register_parameter(f"{name}_delta", nn.Parameter(delta))
                continue
            _, rows, columns = parameter.shape
            A = torch.empty(num_new, r, columns, **settings)
            if not A.is_meta:
                nn.init.uniform_(A, -1 / math.sqrt(columns), 1 / math.sqrt(columns))
            self.register_parameter(f"{name}_A", nn.Parameter(A))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(num_new, rows, r, **settings)))

    def weights(self) -> dict[str, torch.Tensor]:
        """The experts in full, by the names of the family's parameters."""
        found = {}
        for name, parameter in self._base[0].named_parameters(recurse=False):
            if len(self.sources) == 1:
                source = parameter[self.sources[0] : self.sources[0] + 1]
            else:
                source = parameter[self.sources]
            if parameter.dim() == 3:
                difference = self.scaling * torch.bmm(getattr(self, f"{name}_B"), getattr(self, f"{name}_A"))
            else:
                difference = getattr(self, f"{name}_delta")
            found[name] = source + difference.to(source.dtype)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What the experts compute in."""
        return next(self._base[0].parameters()).dtype

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(T, D)` → `(T, D)`, as the experts of the family."""
        inputs = hidden_states, top_k_index, top_k_weights
        return functional_call(self._empty[0], self.weights(), inputs)  # type: ignore[no-any-return]


def dtype_of(experts: nn.Module) -> torch.dtype:
    """What new experts compute in."""
    return experts.dtype if isinstance(experts, LowRankExperts) else next(experts.parameters()).dtype


def full_weights(experts: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of new experts in full, by the names of the family."""
    if isinstance(experts, LowRankExperts):
        return experts.weights()
    return dict(experts.named_parameters(recurse=False))


class MoExtendExperts(MoExtendLayer):
    """The experts of the base model, beside them the new ones; each computes its own tokens only."""

    adapter_layer_names: tuple[str, ...] = ("moextend_experts",)

    def __init__(self, base_layer: nn.Module, block: MoeBlock) -> None:
        super().__init__(base_layer, block)
        self.moextend_experts = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: MoExtendConfig) -> None:
        """Add an adapter, or replace one of the same name."""
        if adapter_name in self.moextend_experts:
            del self.moextend_experts[adapter_name]
        sources = config.sources_in(self.block.layer)
        self.num_new[adapter_name] = len(sources)
        if config.expert_type == "lora":
            experts = LowRankExperts(self.base_layer, sources, r=config.r, lora_alpha=config.lora_alpha)
        else:
            experts = copied_experts(self.base_layer, sources)
        self.moextend_experts[adapter_name] = experts
        self.finish(adapter_name, config)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(T, D)` → `(T, D)`: the weighted sum over old and new experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`)
            top_k_index (`torch.Tensor` of shape `(T, K)`, int64): new experts come after the E old ones.
            top_k_weights (`torch.Tensor` of shape `(T, K)`)
        """
        names = self.acting()
        if not names:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        start = self.block.num_experts
        is_eager = not torch.compiler.is_compiling()
        needs_gradient = any(_learns(self.moextend_experts[name]) for name in names)
        if is_eager and not needs_gradient and not (top_k_index.numel() and int(top_k_index.max()) >= start):
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        if not is_eager:
            # shapes must not depend on the routing: all tokens go everywhere, with weight 0 where they do not belong
            is_old = top_k_index < start
            output = self.base_layer(hidden_states, top_k_index.where(is_old, 0), top_k_weights.where(is_old, 0))
        else:
            output = self._old_experts(hidden_states, top_k_index, top_k_weights)
        for name in names:
            end = start + self.num_new[name]
            is_mine = (top_k_index >= start) & (top_k_index < end)
            experts = self.moextend_experts[name]
            if not is_eager:
                new = experts(
                    hidden_states.to(dtype_of(experts)),
                    (top_k_index - start).where(is_mine, 0),
                    top_k_weights.where(is_mine, 0).to(dtype_of(experts)),
                )
                output = output + new.to(output.dtype)
            else:
                output = self._add_new(output, experts, hidden_states, top_k_index - start, top_k_weights, is_mine)
            start = end
        return output

    def _old_experts(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens without a new expert as in the base model, of the others only the pairs with an old expert."""
        is_old = top_k_index < self.block.num_experts
        is_untouched = is_old.all(dim=-1)
        untouched = is_untouched.nonzero().squeeze(-1)
        if untouched.numel() == top_k_index.shape[0]:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        output = torch.zeros_like(hidden_states)
        if untouched.numel():
            base = self.base_layer(hidden_states[untouched], top_k_index[untouched], top_k_weights[untouched])
            output = output.index_add(0, untouched, base.to(output.dtype))
        token, slot = (is_old & ~is_untouched.unsqueeze(-1)).nonzero(as_tuple=True)
        if token.numel():
            pairs = top_k_index[token, slot, None], top_k_weights[token, slot, None]
            output = output.index_add(0, token, self.base_layer(hidden_states[token], *pairs).to(output.dtype))
        return output

    def _add_new(
        self,
        output: torch.Tensor,
        experts: nn.Module,
        hidden_states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        is_mine: torch.Tensor,
    ) -> torch.Tensor:
        token, slot = is_mine.nonzero(as_tuple=True)
        is_idle = token.numel() == 0
        if is_idle:
            if not (_learns(experts) and index.shape[0]):
                return output
            # one token with weight 0: each rank of a distributed run takes part in every expert's gradient
            token = slot = torch.zeros(1, dtype=torch.int64, device=index.device)
            index = torch.zeros_like(index)
        weight = weights[token, slot, None]
        dtype = dtype_of(experts)
        new = experts(
            hidden_states[token].to(dtype), index[token, slot, None], (weight * 0 if is_idle else weight).to(dtype)
        )
        return output.index_add(0, token, new.to(output.dtype))


def _learns(experts: nn.Module) -> bool:
    """Whether this pass owes their parameters a gradient; some train a model in evaluation mode, without dropout."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in experts.parameters())
