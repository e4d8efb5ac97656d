"""Brings the auxiliary loss of the routers into backward under any training loop, without touching the loss itself.

An auxiliary loss that is added to `outputs.loss` is lost wherever the trainer builds its own loss. So its gradient is
*injected*: [`AuxLoss.inject`] passes the experts' input through unchanged and, in backward, hands the router logits
the gradient of the auxiliary loss, times the weight that the objective gives to this forward pass. That weight is read
from the gradient that arrives at the model's output:

| what the objective is built from | weight of the pass |
|---|---|
| `outputs.loss`, a mean over the batch | gradient of `outputs.loss` |
| `outputs.loss`, a sum over labels divided by `num_items_in_batch` | the same · label tokens / `num_items_in_batch` |
| `outputs.log_probs` (trl), a sum of negative log-likelihoods | minus the sum of their gradient |
| `outputs.logits`, with `num_items_in_batch` given to the model | label tokens / `num_items_in_batch` · processes |
| anything else | 1, or what [`set_aux_loss_scale`] says |

Hence the weights of the micro-batches of one optimizer step add up to that of the task loss, gradient scalers and
data parallelism included, and logged losses stay those of the task.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

from ..forward_context import ForwardContext, ForwardPass, differentiable_outputs, get_context
from ..routing_recorder import (
    RoutingRecorder,
    RoutingStatistics,
    record_name,
    records_of,
    statistics_of,
    token_mask,
)
from .gradient import (
    AttachAuxLoss,
    AuxLossFunction,
    AuxLossState,
    GradientSource,
    InjectAuxLoss,
    PassWeight,
    UpstreamGradient,
)
from .losses import load_balancing_loss, router_z_loss
from .processes import exchange, num_processes, with_other_processes


def weighted_aux_loss(
    statistics: list[RoutingStatistics], *, loss_type: str, aux_loss_coef: float, z_loss_coef: float
) -> torch.Tensor:
    """`aux_loss_coef` · load balancing + `z_loss_coef` · z-loss of one adapter: a scalar, float32."""
    loss = statistics[0].probability_sums.new_zeros(())
    if aux_loss_coef:
        loss = loss + aux_loss_coef * load_balancing_loss(statistics, loss_type=loss_type)
    if z_loss_coef:
        loss = loss + z_loss_coef * router_z_loss(statistics)
    return loss


class AuxLoss:
    """The auxiliary losses of the adapters of one base model; an output hook of its [`ForwardContext`].

    Args:
        recorder (`RoutingRecorder`): where routers leave their statistics.
        shifts_labels (`bool`): whether the model's loss is that of causal language models: it predicts label i + 1 at
            position i, so that the first label of a row does not count, and divides by `num_items_in_batch`. Other
            heads of transformers accept that argument and ignore it.
    """

    def __init__(self, recorder: RoutingRecorder, *, shifts_labels: bool) -> None:
        self.functions: dict[str, AuxLossFunction] = {}
        self.global_adapters: set[str] = set()
        """those whose loss is over the tokens of all processes"""
        self.default_scale: float | torch.Tensor | None = None
        self.shifts_labels = shifts_labels
        self.recorder = recorder
        # before the recorder, whose listeners may ask for the loss of the pass
        recorder.context.output_hooks.insert(0, self)

    def __call__(self, context: ForwardContext, forward_pass: ForwardPass, output: Any) -> Any:
        """Arrange that backward learns the weight of this pass; under `torch.compile`, add to the loss instead."""
        recorded = records_of(forward_pass).keys()
        if not forward_pass.is_awaited or not (recorded & self.functions.keys()):
            return output
        state = forward_pass.state_of(AuxLossState)
        label_share = self._label_share(forward_pass)
        if num_processes() > 1 and (names := sorted(recorded & self.global_adapters)):
            statistics = statistics_of(forward_pass)
            state.elsewhere, label_share = exchange({name: statistics[name] for name in names}, label_share)
        weight = PassWeight(
            label_share=label_share,
            label_mask=output.get("label_mask") if isinstance(output, dict) else None,
            num_items=forward_pass.inputs.get("num_items_in_batch"),
            stated=self.default_scale,
        )
        if torch.compiler.is_compiling() or state.is_compiled:
            return self._attach(forward_pass, output, weight)
        for name, tensor in differentiable_outputs(output):
            tensor.register_hook(UpstreamGradient(name, forward_pass, weight))
        return output

    def inject(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        *,
        adapter_name: str,
        router_name: str,
        shape: torch.Size,
        is_decoder: bool = False,
    ) -> torch.Tensor:
        """Return `hidden_states` `(T, D)` unchanged, so that backward through it reaches `router_logits` `(T, E)`.

        Does nothing where no auxiliary loss is wanted, no gradient flows, or the routers run outside any call of the
        base model. The remaining arguments are those of [`RoutingRecorder.record`].
        """
        forward_pass = self.recorder.context.find_pass()
        if adapter_name not in self.functions or not router_logits.requires_grad:
            return hidden_states
        if forward_pass is None:
            _warn_of_direct_call(router_name)
            return hidden_states
        if torch.compiler.is_compiling():
            forward_pass.state_of(AuxLossState).is_compiled = True
            return hidden_states
        name = record_name(forward_pass, adapter_name, router_name)
        if name is None:
            return hidden_states
        mask = token_mask(forward_pass, shape, is_decoder=is_decoder, router_logits=router_logits)
        source = GradientSource(self.functions[adapter_name], forward_pass, adapter_name, name)
        injected: torch.Tensor = InjectAuxLoss.apply(hidden_states, router_logits, top_k_index, mask, source)
        return injected

    def add(self, adapter_name: str, function: AuxLossFunction, *, is_global: bool = False) -> None:
        """Give an adapter an auxiliary loss, over the tokens of all processes or of each by itself."""
        self.remove(adapter_name)
        self.functions[adapter_name] = function
        if is_global:
            self.global_adapters.add(adapter_name)

    def remove(self, adapter_name: str) -> None:
        """Take the auxiliary loss of an adapter away, if it has one."""
        self.functions.pop(adapter_name, None)
        self.global_adapters.discard(adapter_name)

    def total(
        self, forward_pass: ForwardPass, statistics: dict[str, dict[str, RoutingStatistics]]
    ) -> torch.Tensor | None:
        """Sum of the weighted auxiliary losses over adapters, a scalar, or `None` if no adapter has one."""
        elsewhere = forward_pass.state_of(AuxLossState).elsewhere
        losses = [
            self.functions[name](with_other_processes(by_router, elsewhere.get(name)))
            for name, by_router in statistics.items()
            if name in self.functions
        ]
        return torch.stack(losses).sum() if losses else None

    def _label_share(self, forward_pass: ForwardPass) -> torch.Tensor | float:
        """Share of this pass in what the loss divides by; 1 where the loss is a plain mean."""
        num_items = forward_pass.inputs.get("num_items_in_batch")
        labels = forward_pass.inputs.get("shift_labels")
        if labels is None:
            labels = forward_pass.inputs.get("labels")
            labels = labels[..., 1:] if isinstance(labels, torch.Tensor) else None
        if num_items is None or not self.shifts_labels or not isinstance(labels, torch.Tensor):
            return 1.0
        return labels.ne(-100).sum() / num_items

    def _attach(self, forward_pass: ForwardPass, output: Any, weight: PassWeight) -> Any:
        """What a compiled graph can hold instead of hooks: the auxiliary loss hangs on one of the outputs."""
        total = self.total(forward_pass, self.recorder.live_statistics())
        outputs = dict(differentiable_outputs(output))
        name = next((name for name in ("log_probs", "loss", "logits", *outputs) if name in outputs), None)
        if total is None or name is None:
            return output
        forward_pass.state_of(AuxLossState).is_claimed = True
        attached = AttachAuxLoss.apply(outputs[name], total, name, weight)
        if isinstance(output, dict):
            output[name] = attached
            return output
        if isinstance(output, tuple):
            return tuple(attached if value is outputs[name] else value for value in output)
        return attached


@functools.cache
def _warn_of_direct_call(router_name: str) -> None:
    warnings.warn(
        f"The router of '{router_name}' ran in training, but neither the base model nor its backbone was called, only "
        "a part of it. The auxiliary loss does not act there: call the model itself.",
        stacklevel=2,
    )


def install_aux_loss(base_model: nn.Module, recorder: RoutingRecorder) -> AuxLoss:
    """Return the [`AuxLoss`] that stands on `recorder`, adding a new one if there is none."""
    known = recorder.context.find_hook(AuxLoss)
    return known or AuxLoss(recorder, shifts_labels=_shifts_labels(base_model))


def _shifts_labels(base_model: nn.Module) -> bool:
    """The rule by which transformers' `Trainer` counts `num_items_in_batch`."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    loss_type = getattr(base_model, "loss_type", None)
    is_encoder_decoder = getattr(getattr(base_model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not is_encoder_decoder


def _find_aux_loss(model: nn.Module) -> AuxLoss:
    context = get_context(model)
    found = None if context is None else context.find_hook(AuxLoss)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no router of peft_moe. Wrap it first, for example by "
            "`get_peft_model(model, MoLEConfig(...))`."
        )
    return found


def get_aux_loss(model: nn.Module) -> torch.Tensor:
    """The weighted auxiliary loss of the last forward pass, for training loops that want to add it themselves.

    Returns a scalar, 0 where every coefficient is 0.

    With gradients enabled the result is differentiable and the automatic injection of this pass is switched off, so
    that nothing counts twice: add it to your loss. Under `torch.no_grad()` it is a plain number to log.

    Example:

    ```py
    >>> loss = my_loss(model(**batch).logits, batch["labels"]) + get_aux_loss(model)
    >>> loss.backward()
    ```

    Raises:
        ValueError: `model` has no router of ours.
        RuntimeError: there was no forward pass in training mode, or its routers have no graph (reentrant gradient
            checkpointing), or its backward has begun already.
    """
    aux_loss = _find_aux_loss(model)
    recorder = aux_loss.recorder
    if not aux_loss.functions:
        return torch.zeros(())
    forward_pass = recorder.context.latest
    if forward_pass is None:
        raise RuntimeError(
            "There is no auxiliary loss yet: no forward pass in training mode with gradients enabled has been run. "
            "Call `model.train()` and `model(...)` first."
        )
    if not torch.is_grad_enabled():
        total = aux_loss.total(forward_pass, statistics_of(forward_pass))
        return torch.zeros(()) if total is None else total.detach()
    total = aux_loss.total(forward_pass, recorder.live_statistics())
    if total is None:
        raise RuntimeError(
            "The auxiliary loss of the last forward pass has no graph: either its backward has begun already, or "
            "reentrant gradient checkpointing ran the routers without one. Call get_aux_loss between forward and "
            'backward, and use gradient_checkpointing_kwargs={"use_reentrant": False}; or leave the auxiliary loss to '
            "the automatic injection, which acts in every case."
        )
    forward_pass.state_of(AuxLossState).is_claimed = True
    return total


def set_aux_loss_scale(model: nn.Module, scale: float | torch.Tensor | None) -> None:
    """State the weight of each forward pass for losses that are built outside the model, where it cannot be read off.

    Args:
        model (`nn.Module`): a model with routers of ours.
        scale (`float`, 0-d `torch.Tensor` or `None`): what the objective multiplies the mean loss of one forward pass
            with, for example `1 / gradient_accumulation_steps`, or the scale of a gradient scaler (a tensor is read
            in each forward pass). `None` goes back to the rules at the top of this module. Objectives built from
            `outputs.loss` are not affected: their weight is always known.
    """
    _find_aux_loss(model).default_scale = scale
