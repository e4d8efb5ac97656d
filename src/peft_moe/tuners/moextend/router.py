"""The router of an extended mixture of experts: that of the base model, and the new rows that train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...aux_loss import AuxLoss
from ...foreign_moe import (
    LargerRouter,
    MoeBlock,
    RouterProbe,
    gate_weight_name,
    in_groups,
    per_expert_tensors,
    read_decision,
)
from ...routing import RouterOutput
from ...routing_recorder import RoutingRecorder
from ..base import check_finite, refuse_reentrant_checkpointing_under_ddp, refuse_replica
from .calibration import Calibration
from .config import MoExtendConfig
from .layer import MoExtendLayer


class GateRows(nn.Module):
    """What N new experts add to everything in a router that has an entry for each expert.

    Keys of a saved adapter are those of the router with `.` replaced by `_`: `weight` `(N, D)`, for some families
    `bias` `(N,)` and `e_score_correction_bias` `(N,)`, which does not train; and `offset` `(N,)` for
    `init="copy_guarded"`. A scale of the weights of each expert (gemma4) belongs to the expert, so it is copied
    whatever `init` is.

    Args:
        router (`nn.Module`): of the base model.
        num_experts (`int`): of the base model (E).
        sources (`list[int]`): which expert each new one copies.
        init (`str`): see [`MoExtendConfig`].
        guard_offset (`float`): see [`MoExtendConfig`].
        correction (`torch.Tensor` of shape `(E,)`, *optional*): what the block hands to its router with each call. The
            entries of the new experts are kept as `correction` `(N,)`, which does not train.
    """

    def __init__(
        self,
        router: nn.Module,
        num_experts: int,
        *,
        sources: list[int],
        init: str,
        guard_offset: float,
        correction: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        weight_name = gate_weight_name(router, num_experts)
        for name, (tensor, axis) in per_expert_tensors(router, num_experts).items():
            is_correction = not isinstance(tensor, nn.Parameter) or "correction" in name
            is_scale = not is_correction and name != weight_name and not name.endswith("bias")
            of_rows = "copy" if is_scale else init
            rows = _initial_rows(tensor.detach(), axis, sources, of_rows, is_correction=is_correction)
            self.names[name] = name.replace(".", "_")
            if is_correction:
                self.register_buffer(self.names[name], rows)
            else:
                self.register_parameter(self.names[name], nn.Parameter(rows))
        if correction is None:
            self.register_buffer("correction", None)
        else:
            rows = _initial_rows(correction.detach(), 0, sources, init, is_correction=True)
            self.register_buffer("correction", rows)
        if init == "copy_guarded":
            self.offset: nn.Parameter | None = nn.Parameter(torch.full((len(sources),), float(guard_offset)))
        else:
            self.register_parameter("offset", None)

    def forward(self) -> dict[str, torch.Tensor]:
        """The rows by the names that the router knows."""
        return {name: getattr(self, own) for name, own in self.names.items()}


def _initial_rows(
    tensor: torch.Tensor, axis: int, sources: list[int], init: str, *, is_correction: bool
) -> torch.Tensor:
    if tensor.is_meta or init == "copy" or (init == "copy_guarded" and not is_correction):
        return tensor.index_select(axis, torch.tensor(sources, device=tensor.device)).clone()
    size = [len(sources) if i == axis else entries for i, entries in enumerate(tensor.shape)]
    if init == "zero_gate" and not is_correction:
        return tensor.new_zeros(size)
    if init in ("zero_gate", "mean_gate"):
        # corrections are compared with each other only: 0 means nothing among them
        return tensor.mean(dim=axis, keepdim=True).expand(size).clone()
    # a correction that favours the copy would undo the guard
    return tensor.amin(dim=axis, keepdim=True).expand(size).clone()


class MoExtendRouter(MoExtendLayer):
    """The router of the base model with further rows; its own code chooses among all experts."""

    adapter_layer_names: tuple[str, ...] = ("moextend_gate", "moextend_calibration")

    def __init__(
        self, base_layer: nn.Module, block: MoeBlock, probe: RouterProbe, recorder: RoutingRecorder, aux_loss: AuxLoss
    ) -> None:
        super().__init__(base_layer, block)
        self.probe = probe
        self.recorder = recorder
        self.aux_loss = aux_loss
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
            width = self.larger_router.weight_of(self.base_layer).shape[-1]
            self.moextend_calibration[adapter_name] = Calibration(
                config.calibration,
                self.probe.scoring,
                in_features=width if config.calibration == "paper" else num_experts + len(sources),
                calibration_dim=config.calibration_dim,
                num_experts=num_experts + len(sources),
            )
        self.finish(adapter_name, config)

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
        decision = read_decision(output, num_experts, is_probability=self.probe.is_probability)
        if isinstance(decision, str):
            raise RuntimeError(f"'{self.block.router}' {decision}. MoExtend does not know this router.")
        check_finite(decision.router_logits, f"'{self.block.router}' (adapter {', '.join(names)}) gave values")
        weights = self._calibrated(names, hidden_states, decision)
        # the adapters share one decision, which is balanced once: by the first of them that has a loss
        balancing = next((name for name in names if name in self.aux_loss.functions), names[0])
        balanced = self._balanced(balancing, decision, weights, hidden_states.shape[:-1])
        return tuple(balanced if entry is decision.top_k_weights else entry for entry in output)

    def _concerns_others(self, names: list[str]) -> bool:
        """Whether anything but the experts reads the decision. Evaluation takes no detour: as in the base model NaN
        then passes through, which loading refuses and training stops at."""
        return (
            self.training
            or self.recorder.needs_record(is_training=False)
            or any(name in self.moextend_calibration for name in names)
        )

    def _check_zero3(self, hidden_states: torch.Tensor) -> None:
        """Raise where DeepSpeed ZeRO-3 would gather the block too late, or count its gradients before they are
        there."""
        parameter = self.larger_router.weight_of(self.base_layer)
        if not hasattr(parameter, "ds_id"):
            return
        if not hasattr(parameter, "ds_z3_leaf_module"):
            raise RuntimeError(
                f"DeepSpeed ZeRO-3 has to gather '{self.block.name}' as a whole, since MoExtend runs its router with "
                "further rows. Name its class: zero_optimization={'leaf_module': {'classes': [...]}} in the config of "
                "DeepSpeed, or deepspeed_moe_layer_cls_names in that of accelerate."
            )
        if self.training and torch.is_grad_enabled() and not hidden_states.requires_grad:
            raise RuntimeError(
                f"DeepSpeed ZeRO-3 takes the gradients of '{self.block.name}' when that of its input is there, but "
                "its input has none, so new experts would get zeros. Call model.enable_input_require_grads() before "
                "training."
            )

    def _with_corrections(self, argument: Any, gates: list[GateRows]) -> Any:
        """An argument of the router; the correction of the block gets entries for the new experts."""
        if self.block.correction is None or not isinstance(argument, torch.Tensor) or argument.dim() != 1:
            return argument
        return in_groups(
            [argument, *(gate.correction.to(argument.dtype) for gate in gates)], 0, self.larger_router.groups
        )

    def _calibrated(self, names: list[str], hidden_states: torch.Tensor, decision: RouterOutput) -> torch.Tensor:
        calibrated = [name for name in names if name in self.moextend_calibration]
        if not calibrated:
            return decision.top_k_weights  # type: ignore[return-value]
        if len(names) > 1:
            raise RuntimeError(
                f"The adapters {names} are active together, but {calibrated[0]!r} has a calibration, which was made "
                "for its own experts alone. Activate one of them, or train with calibration=None."
            )
        weights: torch.Tensor = self.moextend_calibration[calibrated[0]](hidden_states, decision)
        check_finite(weights, f"'{self.block.router} (calibration)' (adapter {', '.join(names)}) gave values")
        return weights

    def _balanced(
        self, adapter_name: str, decision: RouterOutput, weights: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """The weights unchanged, with the load-balancing loss hung on them."""
        is_training = self.training and adapter_name in self.aux_loss.functions
        needs_record = self.recorder.needs_record(is_training=is_training)
        if not (self.training or needs_record):
            return weights
        logits = decision.router_logits.reshape(-1, decision.router_logits.shape[-1])
        index = decision.top_k_index.reshape(-1, decision.top_k_index.shape[-1])
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
            weights, logits, index, adapter_name=adapter_name, router_name=self.block.name, shape=shape
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
