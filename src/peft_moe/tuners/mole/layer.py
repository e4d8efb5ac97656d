"""A frozen linear with LoRA experts, and the decision of a router that the linears of an MLP share."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...aux_loss import AuxLoss
from ...kernels import DispatchPlan
from ...routing import RouterOutput, TopKRouter
from ...routing_recorder import RoutingRecorder
from ..base import check_finite, refuse_reentrant_checkpointing_under_ddp, refuse_replica
from ..lora_layer import Dispatch, LoraExpertsLayer
from .config import MoLEConfig


class RouterScope:
    """The linears that follow one router, in the order in which they were found; the first one owns the router.

    The owner leaves its decision here in each forward, the others take it, each once. What is left over or missing
    shows that the linears were not called as one MLP, which is an error and not a reason to guess.

    Args:
        name (`str`): name of the MLP (or of the linear, with `router_scope="module"`).
        adapter_name (`str`): the adapter that this scope belongs to.
    """

    def __init__(self, name: str, adapter_name: str) -> None:
        self.name = name
        self.adapter_name = adapter_name
        self.members: list[str] = []
        self.num_experts = 0
        self._dispatch: Dispatch | None = None
        self._waiting: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A decision belongs to a running forward; copies start without one."""
        return {**self.__dict__, "_dispatch": None, "_waiting": set()}

    def leave(self, dispatch: Dispatch) -> None:
        """Called by the owner."""
        # also where a recomputation by gradient checkpointing begins the MLP anew
        self._waiting = set(self.members[1:])
        self._dispatch = dispatch if self._waiting else None

    def take(self, member: str, num_tokens: int) -> Dispatch:
        """Called by every other member, for `num_tokens` tokens."""
        dispatch = self._dispatch
        if dispatch is None or member not in self._waiting:
            raise RuntimeError(
                f"'{member}' follows the router of '{self.members[0]}', but was called before it or twice in one "
                "forward pass. This MLP does not call its linears in their usual order; use "
                'MoLEConfig(router_scope="module"), which gives each linear its own router.'
            )
        if dispatch.plan.num_tokens != num_tokens:
            raise RuntimeError(
                f"'{member}' received {num_tokens} tokens, but the router of '{self.members[0]}' routed "
                f'{dispatch.plan.num_tokens}. Use MoLEConfig(router_scope="module"), which gives each linear its own '
                "router."
            )
        self._waiting.discard(member)
        if not self._waiting:
            self._dispatch = None
        return dispatch


class MoLELayer(LoraExpertsLayer):
    """A linear with stacked LoRA experts; the first linear of an MLP also holds its router.

    Keys of a saved adapter: `mole_A.weight` `(E, R, D)`, `mole_B.weight` `(E, R, O)`, `mole_router.weight` `(E, D)`
    and `mole_router.bias` `(E,)`.
    """

    prefix = "mole_"
    # PEFT takes the parameters of an adapter from the first of these lists, and empties both where one is deleted
    adapter_layer_names: tuple[str, ...] = ("mole_A", "mole_B", "mole_router")
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "num_experts",
        "mole_dropout",
        "scopes",
        "backend",
    )

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder, aux_loss: AuxLoss) -> None:
        super().__init__(base_layer, name, recorder)
        self.aux_loss = aux_loss
        self.scopes: dict[str, RouterScope] = {}
        self.mole_A = nn.ModuleDict()
        self.mole_B = nn.ModuleDict()
        self.mole_dropout = nn.ModuleDict()
        self.mole_router = nn.ModuleDict()

    def update_layer(
        self,
        adapter_name: str,
        config: MoLEConfig,
        *,
        r: int,
        lora_alpha: float,
        scope: RouterScope | None,
    ) -> None:
        """Add an adapter, or replace one of the same name; not yet on the right device.

        Args:
            adapter_name (`str`), config (`MoLEConfig`): which adapter.
            r (`int`), lora_alpha (`float`): those of this linear, patterns applied.
            scope (`RouterScope`, *optional*): whose router this linear follows; `None` is ordinary LoRA.
        """
        num_experts = 1 if scope is None else scope.num_experts
        self.scopes.pop(adapter_name, None)
        if adapter_name in self.mole_router:
            del self.mole_router[adapter_name]
        self.add_experts(adapter_name, config, num_experts=num_experts, r=r, lora_alpha=lora_alpha)
        if scope is not None:
            self.scopes[adapter_name] = scope
            if scope.members[0] == self.name:
                self.mole_router[adapter_name] = _new_router(self.in_features, num_experts, config)

    def is_exactly_mergeable(self, adapter_name: str) -> bool:
        """Whether the adapter is one LoRA for every token here."""
        return self.num_experts.get(adapter_name, 1) == 1

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a single low-rank matrix says the same: with one expert it does."""
        return self.is_exactly_mergeable(adapter_name)

    def dispatch(
        self, adapter_name: str, x: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, Dispatch | None]:
        """Ask the router, or take over what it decided for an earlier linear of the same MLP."""
        scope = self.scopes.get(adapter_name)
        if scope is None:
            return hidden_states, None
        if adapter_name not in self.mole_router:
            return hidden_states, scope.take(self.name, x.shape[:-1].numel())
        output = self._ask_router(scope, x)
        dispatch = Dispatch(DispatchPlan.from_index(output.top_k_index, output.num_experts), output.top_k_weights)
        scope.leave(dispatch)
        if self.training:
            hidden_states = self.aux_loss.inject(
                hidden_states,
                output.router_logits,
                output.counted_index,
                adapter_name=adapter_name,
                router_name=scope.name,
                shape=x.shape[:-1],
                is_decoder=self.is_decoder,
            )
        return hidden_states, dispatch

    def _ask_router(self, scope: RouterScope, x: torch.Tensor) -> RouterOutput:
        adapter_name = scope.adapter_name
        refuse_replica(self)
        if self.training and not torch.compiler.is_compiling():
            refuse_reentrant_checkpointing_under_ddp(self.recorder)
        output: RouterOutput = self.mole_router[adapter_name](x.reshape(-1, self.in_features))
        check_finite(output.router_logits, f"The router of '{scope.name}' (adapter {adapter_name!r}) got logits")
        is_training = self.training and adapter_name in self.aux_loss.functions
        if self.recorder.needs_record(is_training=is_training):
            self.recorder.record(
                adapter_name,
                scope.name,
                output,
                shape=x.shape[:-1],
                is_training=is_training,
                is_decoder=self.is_decoder,
            )
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the only expert of each adapter to the base weight.

        Raises:
            ValueError: an adapter routes tokens here, or the base layer is quantised, or (with `safe_merge`) the
                merged weight would not be finite.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.mole_A:
                continue
            weight = self.check_mergeable(adapter_name)
            merged = weight.data + self.get_delta_weight(adapter_name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
                    f"'{self.name}' would get weights that are not finite, so nothing was merged here."
                )
            weight.data = merged
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Subtract what [`merge`] added."""
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            weight = self.check_mergeable(adapter_name)
            weight.data = weight.data - self.get_delta_weight(adapter_name).to(weight.dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the only expert adds to the base weight, in the layout of the base weight."""
        A, B = self.mole_A[adapter_name].weight[0], self.mole_B[adapter_name].weight[0]
        delta = self.scaling[adapter_name] * (A.T @ B)
        return delta if isinstance(self.get_base_layer(), Conv1D) else delta.T

    def check_mergeable(self, adapter_name: str) -> torch.Tensor:
        """Return the weight that the adapter can be merged into, or raise `ValueError`."""
        if not self.is_exactly_mergeable(adapter_name):
            raise ValueError(
                f"'{self.name}': {self.num_experts[adapter_name]} experts that are chosen token by token cannot be "
                "merged into one weight. Keep the adapter (it is small, and `save_pretrained` stores all of it); or "
                "train with num_experts=1, which is LoRA and merges exactly; or, to drop the adapter, use `unload()`."
            )
        weight = self.get_base_layer().weight
        if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point:
            raise ValueError(
                f"'{self.name}' is quantised ({type(self.get_base_layer()).__name__}), and merging would round the "
                "adapter away. Load the base model without quantisation and merge there."
            )
        return weight


def _new_router(in_features: int, num_experts: int, config: MoLEConfig) -> TopKRouter:
    router = TopKRouter(
        in_features,
        num_experts,
        top_k=config.top_k,
        bias=config.router_bias,
        gate_scale=config.gate_scale,
        soft=config.soft,
        normalize_top_k=config.normalize_top_k,
        jitter_noise=config.router_jitter_noise,
    )
    if config.router_init_std is not None and not router.weight.is_meta:
        nn.init.normal_(router.weight, std=config.router_init_std)
        if router.bias is not None:
            nn.init.zeros_(router.bias)
    return router
