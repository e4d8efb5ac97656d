"""Lets `output_router_logits=True` past the model's own load-balancing loss, which counts the same experts everywhere.

The backbone returns the logits of all layers, of different widths. The head, which would stack them, is told that nobody
asked; its `aux_loss` is then that of the extended layers, as a number, and its loss is that of the task alone. What trains
is the balance loss of the adapter, by [`AuxLoss`]. A head that balances its routers in training whether or not anybody asked
(`MoeLlava`) is told that nobody wants it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...aux_loss import load_balancing_loss
from ...forward_context import ForwardPass
from ...pretrained_moe import BASE
from ...routing_recorder import RoutingRecorder, statistics_of
from .layer import MoExtendRouter


FLAG, COEF = "output_router_logits", "router_aux_loss_coef"


class _Request:
    """Whether the running call asked for router logits; a listener of the recorder while it did.

    Args:
        recorder (`RoutingRecorder`): of the model.
    """

    def __init__(self, recorder: RoutingRecorder) -> None:
        self.recorder = recorder
        self.is_asked = False
        self.aux_loss: torch.Tensor | None = None
        self.has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_asked": False, "aux_loss": None}

    def __call__(self, forward_pass: ForwardPass) -> None:
        """Called by the recorder with the finished pass."""
        # a layer records its decision once, for one of the adapters that act there
        found = [
            entry
            for name, records in statistics_of(forward_pass).items()
            if name != BASE
            for entry in records.values()
        ]
        if found:
            self.aux_loss = load_balancing_loss(found)

    def open(self) -> None:
        """A call that asks begins."""
        self.close()
        self.is_asked, self.aux_loss = True, None
        self.recorder.listeners.append(self)

    def close(self) -> None:
        """It ends, perhaps by an exception; or the next one begins, where an interruption (Ctrl-C) let no hook run."""
        self.is_asked = False
        while self in self.recorder.listeners:
            self.recorder.listeners.remove(self)


class _BeforeHead:
    """Forward pre-hook of the model with the head."""

    def __init__(self, request: _Request) -> None:
        self.request = request

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.request.close()
        config = getattr(module, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        is_asked = kwargs.get(FLAG)
        if is_asked is None:
            is_asked = getattr(config, FLAG, False)
        balances_unasked = module.training and getattr(module, "balances_in_training", False)
        if not (is_asked or balances_unasked):
            return None
        if not any(isinstance(m, MoExtendRouter) and m.acting() for m in module.modules()):
            return None
        if not is_asked:
            return args, {**kwargs, FLAG: False}
        if isinstance(module, PeftModel):
            raise ValueError(
                f"{FLAG}=True does not reach past the model's own load-balancing loss here, because MoExtend was put around "
                "a PeftModel. Set it to False; outputs and training need it for nothing. Or merge the adapters inside "
                "before the experts are added."
            )
        self._warn_once(module, config)
        self.request.open()
        return args, {**kwargs, FLAG: False}

    def _warn_once(self, module: nn.Module, config: Any) -> None:
        coef = getattr(module, COEF, None) or getattr(config, COEF, None) or 0.0
        if not coef or not module.training or self.request.has_warned:
            return
        self.request.has_warned = True
        warnings.warn(
            f"{type(module).__name__} was asked for router logits, but its own load-balancing loss ({COEF}={coef} of its "
            "configuration) is not part of its loss while new experts are active. What balances the extended layers is "
            f"{COEF} of MoExtendConfig; other layers are not balanced.",
            stacklevel=2,
        )


class _BeforeBackbone:
    """Forward pre-hook of the backbone."""

    def __init__(self, request: _Request) -> None:
        self.request = request

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, FLAG: True}) if self.request.is_asked else None


class _AfterHead:
    """Forward hook of the model with the head, called after the recorder's, and also when forward raised."""

    def __init__(self, request: _Request) -> None:
        self.request = request

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.request.is_asked:
            self.request.close()
            if isinstance(output, dict) and hasattr(output, "aux_loss") and self.request.aux_loss is not None:
                output["aux_loss"] = self.request.aux_loss
        return output


def open_native_router_logits(model: nn.Module, recorder: RoutingRecorder) -> None:
    """Install the hooks, unless they are there or `model` is a backbone without a head."""
    backbone = getattr(model, "base_model", None)
    is_open = any(isinstance(hook, _BeforeHead) for hook in model._forward_pre_hooks.values())
    if is_open or not isinstance(backbone, nn.Module) or backbone is model:
        return
    request = _Request(recorder)
    model.register_forward_pre_hook(_BeforeHead(request), with_kwargs=True)
    model.register_forward_hook(_AfterHead(request), always_call=True)
    backbone.register_forward_pre_hook(_BeforeBackbone(request), with_kwargs=True)


def close_native_router_logits(model: nn.Module) -> None:
    """Remove the hooks."""
    backbone = getattr(model, "base_model", None)
    for module in (model, backbone) if isinstance(backbone, nn.Module) and backbone is not model else (model,):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in list(hooks.items()):
                if isinstance(hook, _BeforeHead | _BeforeBackbone | _AfterHead):
                    del hooks[handle]
                    module._forward_pre_hooks_with_kwargs.pop(handle, None)
                    module._forward_hooks_always_called.pop(handle, None)
