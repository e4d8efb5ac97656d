"""The two layers of an extended mixture of experts: its router and its experts."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...aux_loss import AuxLoss
from ...foreign_moe import (
    MoeBlock,
    Routing,
    gate_weight_name,
    read_routing,
    returns_probabilities,
)
from ...foreign_moe.routers import in_groups
from ...recording import RoutingRecorder
from ...routing import RouterOutput
from ..base import check_finite, refuse_reentrant_checkpointing_under_ddp, refuse_replica
from .calibration import Calibration, measure_scoring
from .config import MoExtendConfig
from .experts import LowRankExperts, copied_experts, dtype_of
from .gate import GateRows
from .larger_router import LargerRouter


class MoExtendLayer(nn.Module, BaseTunerLayer):
    """What both layers share: which adapters act here.

    Args:
        base_layer (`nn.Module`): router or experts of the base model.
        block (`MoeBlock`): where that is.
    """

    prefix = "moextend_"
    other_param_names: tuple[str, ...] = ("num_new",)

    def __init__(self, base_layer: nn.Module, block: MoeBlock) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block = block
        self.num_new: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def acting(self) -> list[str]:
        """The active adapters that have new experts here, in the order of their experts."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.num_new]

    def finish(self, adapter_name: str, config: MoExtendConfig) -> None:
        """Called at the end of adding an adapter."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT does, but buffers keep their type: a correction in float32 is not rounded to that of the weights."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        added = [container[adapter_name] for container in containers if adapter_name in container]
        owners = [owner for entry in added for owner in entry.modules()]
        before = [(owner, name, b) for owner in owners for name, b in owner.named_buffers(recurse=False)]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for owner, name, buffer in before:
            setattr(owner, name, buffer.to(getattr(owner, name).device))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Those of the first parameter: PEFT looks for a `weight`, which experts do not have."""
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: the tensors of the base model would need another shape."""
        raise ValueError(MERGE_IN_PLACE_IS_IMPOSSIBLE)

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""

    def __repr__(self) -> str:
        return "moextend." + super().__repr__()


MERGE_IN_PLACE_IS_IMPOSSIBLE = (
    "New experts need larger tensors than the base model has, so they cannot be merged in place. Use merge_and_unload(), "
    "which returns an enlarged model; or keep the adapter."
)


class MoExtendRouter(MoExtendLayer):
    """The router of the base model with further rows; its own code chooses among all experts."""

    adapter_layer_names: tuple[str, ...] = ("moextend_gate", "moextend_calibration")

    def __init__(self, base_layer: nn.Module, block: MoeBlock, recorder: RoutingRecorder, aux_loss: AuxLoss) -> None:
        super().__init__(base_layer, block)
        self.recorder = recorder
        self.aux_loss = aux_loss
        self.is_probability = returns_probabilities(base_layer, block)
        self.larger_router = LargerRouter(base_layer, block.num_experts)
        self.moextend_gate = nn.ModuleDict()
        self.moextend_calibration = nn.ModuleDict()

    def update_layer(
        self, adapter_name: str, config: MoExtendConfig, *, correction: torch.Tensor | None = None
    ) -> None:
        """Add an adapter, or replace one of the same name; `correction` is that of the block."""
        for container in (self.moextend_gate, self.moextend_calibration):
            if adapter_name in container:
                del container[adapter_name]
        sources = config.sources_in(self.block.layer)
        num_experts = self.block.num_experts
        self.num_new[adapter_name] = len(sources)
        self.moextend_gate[adapter_name] = GateRows(
            self.base_layer,
            num_experts,
            sources=sources,
            init=config.init,
            guard_offset=config.guard_offset,
            correction=correction,
        )
        if config.calibration is not None:
            self.moextend_calibration[adapter_name] = self._new_calibration(config, num_experts + len(sources))
        self.finish(adapter_name, config)

    def _new_calibration(self, config: MoExtendConfig, num_experts: int) -> Calibration:
        in_features, scoring = num_experts, None
        if config.calibration == "paper":
            name = gate_weight_name(self.base_layer, self.block.num_experts)
            in_features = self.base_layer.get_parameter(name).shape[-1]  # type: ignore[arg-type]
        else:
            scoring = measure_scoring(self.base_layer, self.block)
        return Calibration(
            config.calibration,  # type: ignore[arg-type]
            scoring,
            in_features=in_features,
            calibration_dim=config.calibration_dim,
            num_experts=num_experts,
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the router of the base model returns, for all experts: new ones come after the old ones."""
        names = self.acting()
        if not names:
            return self.base_layer(hidden_states, *args, **kwargs)
        refuse_replica(self)
        self._check_zero3(hidden_states)
        gates = [self.moextend_gate[name] for name in names]
        output = self.larger_router(
            self.base_layer,
            [gate() for gate in gates],
            hidden_states,
            *(self._with_corrections(argument, gates) for argument in args),
            offset=_offsets(gates),
            **{name: self._with_corrections(argument, gates) for name, argument in kwargs.items()},
        )
        if not self._concerns_others(names):
            return output
        num_experts = self.block.num_experts + sum(self.num_new[name] for name in names)
        routing = read_routing(output, num_experts, is_probability=self.is_probability)
        if isinstance(routing, str):
            raise RuntimeError(f"'{self.block.router}' {routing}. MoExtend does not know this router.")
        check_finite(routing.router_logits, f"'{self.block.router}' (adapter {', '.join(names)}) gave values")
        weights = self._calibrated(names, hidden_states, routing)
        # the adapters share one decision, which is balanced once: by the first of them that has a loss
        balancing = next((name for name in names if name in self.aux_loss.functions), names[0])
        return routing.with_weights(self._balanced(balancing, routing, weights, hidden_states.shape[:-1]))

    def _concerns_others(self, names: list[str]) -> bool:
        """Whether anything but the experts reads the decision. Evaluation takes no detour: as in the base model NaN then
        passes through, which loading refuses and training stops at."""
        return (
            self.training
            or self.recorder.needs_record(is_training=False)
            or any(name in self.moextend_calibration for name in names)
        )

    def _check_zero3(self, hidden_states: torch.Tensor) -> None:
        """Raise where DeepSpeed ZeRO-3 would gather the block too late, or count its gradients before they are there."""
        parameter = self.larger_router.weight_of(self.base_layer)
        if not hasattr(parameter, "ds_id"):
            return
        if not hasattr(parameter, "ds_z3_leaf_module"):
            raise RuntimeError(
                f"DeepSpeed ZeRO-3 has to gather '{self.block.name}' as a whole, since MoExtend runs its router with further "
                "rows. Name its class: zero_optimization={'leaf_module': {'classes': [...]}} in the config of DeepSpeed, or "
                "deepspeed_moe_layer_cls_names in that of accelerate."
            )
        if self.training and torch.is_grad_enabled() and not hidden_states.requires_grad:
            raise RuntimeError(
                f"DeepSpeed ZeRO-3 takes the gradients of '{self.block.name}' when that of its input is there, but its input "
                "has none, so new experts would get zeros. Call model.enable_input_require_grads() before training."
            )

    def _with_corrections(self, argument: Any, gates: list[GateRows]) -> Any:
        """An argument of the router; the correction of the block gets entries for the new experts."""
        if self.block.correction is None or not isinstance(argument, torch.Tensor) or argument.dim() != 1:
            return argument
        return in_groups(
            [argument, *(gate.correction.to(argument.dtype) for gate in gates)], 0, self.larger_router.groups
        )

    def _calibrated(self, names: list[str], hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        calibrated = [name for name in names if name in self.moextend_calibration]
        if not calibrated:
            return routing.top_k_weights
        if len(names) > 1:
            raise RuntimeError(
                f"The adapters {names} are active together, but {calibrated[0]!r} has a calibration, which was made for "
                "its own experts alone. Activate one of them, or train with calibration=None."
            )
        weights: torch.Tensor = self.moextend_calibration[calibrated[0]](hidden_states, routing)
        check_finite(weights, f"'{self.block.router} (calibration)' (adapter {', '.join(names)}) gave values")
        return weights

    def _balanced(self, adapter_name: str, routing: Routing, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The weights unchanged, with the load-balancing loss hung on them."""
        is_training = self.training and adapter_name in self.aux_loss.functions
        needs_record = self.recorder.needs_record(is_training=is_training)
        if not (self.training or needs_record):
            return weights
        logits = routing.router_logits.reshape(-1, routing.router_logits.shape[-1])
        index = routing.top_k_index.reshape(-1, routing.top_k_index.shape[-1])
        if needs_record:
            self.recorder.record(
                adapter_name,
                self.block.name,
                RouterOutput(logits, index, weights),
                shape=shape,
                is_training=is_training,
            )
        if not self.training:
            return weights
        if not torch.compiler.is_compiling():
            refuse_reentrant_checkpointing_under_ddp(self.recorder)
        return self.aux_loss.inject(
            weights,
            logits,
            index,
            recorder=self.recorder,
            adapter_name=adapter_name,
            router_name=self.block.name,
            shape=shape,
        )


def _offsets(gates: list[GateRows]) -> torch.Tensor | None:
    offsets = [gate.offset for gate in gates]
    if all(offset is None for offset in offsets):
        return None
    parts = [
        next(gate.parameters()).new_zeros(len(next(gate.parameters()))) if offset is None else offset
        for gate, offset in zip(gates, offsets, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
