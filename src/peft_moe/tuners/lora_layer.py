"""What the layers with LoRA experts share: stacked experts, and the way from the base layer's output to the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..kernels import DispatchPlan, lora_experts
from ..routing_recorder import RoutingRecorder
from .lora_config import LoraExpertsConfig


class StackedWeight(nn.Module):
    """One weight per expert, `(E, R, features)`: the down or the up projections of all experts of a linear.

    Every expert is a slice of one parameter, so each rank of a distributed run takes part in every expert's gradient
    even if it routed no token there. The rank comes first in both projections, which makes `weight.view(E · R, …)` the
    matrix of all experts side by side.
    """

    def __init__(self, num_experts: int, rank: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, rank, features))

    def forward(self) -> torch.Tensor:
        """Return the weight. Called as a module so that sharded training gathers it first."""
        return self.weight

    def reset_kaiming_uniform(self) -> None:
        """Uniform in ±1/√features for each expert, the default of `nn.Linear` and of LoRA's A."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Shape, as `nn.Linear` shows it."""
        num_experts, rank, features = self.weight.shape
        return f"num_experts={num_experts}, rank={rank}, features={features}"


@dataclass(frozen=True)
class Dispatch:
    """A decision as the kernels take it: a plan and the weights of the experts (or `None`: all 1)."""

    plan: DispatchPlan
    top_k_weights: torch.Tensor | None


class LoraExpertsLayer(nn.Module, BaseTunerLayer):
    """A frozen linear whose output gets the LoRA experts of each token added.

    The base layer is only called, never read, so `nn.Linear`, `Conv1D` and quantised linears take the same path.
    A subclass says in [`dispatch`] who goes where.

    Args:
        base_layer (`nn.Module`): the linear.
        name (`str`): its name in the model.
        recorder (`RoutingRecorder`): that of the model.
    """

    prefix: str
    """what the names of the containers begin with that a subclass makes: `…A`, `…B` and `…dropout`"""

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.recorder = recorder
        self.is_decoder = False
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self.backend: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.nx, base.nf
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    def _part(self, part: str) -> nn.ModuleDict:
        container: nn.ModuleDict = getattr(self, self.prefix + part)
        return container

    def add_experts(
        self, adapter_name: str, config: LoraExpertsConfig, *, num_experts: int, r: int, lora_alpha: float
    ) -> None:
        """Add the experts of an adapter, or replace those of one with the same name; not yet on the right device."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.num_experts[adapter_name] = num_experts
        self.backend[adapter_name] = config.kernel_backend
        self._part("A")[adapter_name] = StackedWeight(num_experts, r, self.in_features)
        self._part("B")[adapter_name] = StackedWeight(num_experts, r, self.out_features)
        self._part("dropout")[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.reset_parameters(adapter_name, config.init_lora_weights)

    def reset_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """A as LoRA does (`"gaussian"`: normal of width 1/r), B zero; with `False`, B is as random as A."""
        A, B = self._part("A")[adapter_name], self._part("B")[adapter_name]
        if A.weight.is_meta:
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
        else:
            A.reset_kaiming_uniform()
        if init_lora_weights is False:
            B.reset_kaiming_uniform()
        else:
            nn.init.zeros_(B.weight)

    def dispatch(
        self, adapter_name: str, x: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, Dispatch | None]:
        """Say which experts each token uses.

        Args:
            adapter_name (`str`): whose experts.
            x (`torch.Tensor` of shape `(..., D)`): input of the layer.
            hidden_states (`torch.Tensor`): the same, flattened and cast as the experts will read it.

        Returns:
            `hidden_states`, perhaps with an auxiliary loss hung on it, and the decision; `None` is ordinary LoRA.
        """
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., D)` → `(..., O)`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        experts = self._part("A")
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in experts]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        owns_result = self._owns_result(args, kwargs)
        # a linear returns a view for more than two axes, and only what is no view is cheap to overwrite
        result = self.base_layer(x.reshape(-1, self.in_features) if owns_result else x, *args, **kwargs)
        for adapter_name in names:
            result = self._add_to(result, adapter_name, x, inplace=owns_result)
        return result.view(*x.shape[:-1], self.out_features) if owns_result else result

    def _owns_result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nobody else can see the output of the base layer, so that it may be overwritten."""
        base = self.base_layer
        is_plain = type(base) in (nn.Linear, Conv1D) and not args and not kwargs
        is_watched = bool(base._forward_hooks or base._forward_pre_hooks)
        return is_plain and not is_watched and not torch.compiler.is_compiling()

    def _add_to(self, result: torch.Tensor, adapter_name: str, x: torch.Tensor, *, inplace: bool) -> torch.Tensor:
        A, B = self._part("A")[adapter_name](), self._part("B")[adapter_name]()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else A.dtype
        hidden_states = self._cast_input_dtype(x, dtype).reshape(*result.shape[:-1], self.in_features)
        # routers read x itself: neither dropout nor the dtype of the experts may change a decision
        hidden_states, dispatch = self.dispatch(adapter_name, x, hidden_states)
        if self.training:
            hidden_states = self._part("dropout")[adapter_name](hidden_states)
        if A.dtype != dtype:
            A, B = A.to(dtype), B.to(dtype)
        return lora_experts(
            hidden_states,
            result,
            A,
            B,
            plan=None if dispatch is None else dispatch.plan,
            top_k_weights=None if dispatch is None else dispatch.top_k_weights,
            scaling=self.scaling[adapter_name],
            backend=self.backend[adapter_name],
            inplace=inplace and not result._is_view(),
        )

    def check_mergeable(self, adapter_name: str) -> torch.Tensor:
        """Return the weight that the adapter can be merged into, or raise `ValueError`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.prefix.replace("_", ".") + super().__repr__()
