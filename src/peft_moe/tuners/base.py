"""What the tuners share: injection around a recorder, checked loading, honest refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..aux_loss import AuxLoss, AuxLossFunction, install_aux_loss, weighted_aux_loss
from ..forward_context import remove_context
from ..routing_recorder import RoutingRecorder, install_recorder


def refuse_reentrant_checkpointing_under_ddp(recorder: RoutingRecorder, *, shares_parameters: bool = False) -> None:
    """Raise where DDP would fail in backward with a message about parameters that are ready twice.

    Reentrant checkpointing runs the first forward of a block without gradients inside a pass that has them. DDP's
    search for unused parameters then counts the parameters of each block several times; and each block has a backward
    of its own, which makes a parameter that several blocks share ready several times.

    Args:
        recorder (`RoutingRecorder`): knows the running pass.
        shares_parameters (`bool`): whether several blocks use the same parameter of the adapter.

    Raises:
        RuntimeError: with what to set instead.
    """
    forward_pass = recorder.context.current
    if torch.is_grad_enabled() or forward_pass is None or not forward_pass.has_gradient:
        return
    if not (dist.is_available() and dist.is_initialized()):
        return
    ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not (ddp.find_unused_parameters or shares_parameters):
        return
    if shares_parameters:
        why = "where layers share a table of cluster embeddings"
        instead = "cluster_embedding_scope='layer' together with ddp_find_unused_parameters=False"
    else:
        why = "with find_unused_parameters=True (what Trainer sets for a PeftModel)"
        instead = "ddp_find_unused_parameters=False"
    raise RuntimeError(
        f"Reentrant gradient checkpointing does not work under DistributedDataParallel {why}: backward would fail. "
        f'Use gradient_checkpointing_kwargs={{"use_reentrant": False}}, or {instead}.'
    )


def refuse_replica(layer: nn.Module) -> None:
    """Raise `RuntimeError` under `nn.DataParallel`, whose replicas would share the routing of one model."""
    if "_is_replica" in layer.__dict__:
        raise RuntimeError(
            f"{type(layer).__name__} does not support nn.DataParallel, which Trainer uses when one process sees "
            "several GPUs: its replicas would share the routing of one model. Launch with `accelerate launch` or "
            "`torchrun`, or make a single GPU visible with CUDA_VISIBLE_DEVICES."
        )


def check_finite(values: torch.Tensor, what: str) -> None:
    """Stop where the model diverged, not later at an index made of NaN; on a GPU without waiting for the device.

    Args:
        values (`torch.Tensor`): of any shape.
        what (`str`): subject and verb of the message, for example `"The router of 'mlp' got logits"`.

    Raises:
        FloatingPointError: a value is not finite (on a GPU: an assertion of the device).
    """
    if torch.compiler.is_compiling() or values.is_meta:
        return
    total = _total(values)
    message = (
        f"{what} that are not finite. The hidden states or the adapter contain NaN or infinity: lower the learning "
        "rate, clip gradients, or check the checkpoint."
    )
    if values.device.type == "cpu":
        if not math.isfinite(total.item()):
            raise FloatingPointError(message)
    elif values.is_cuda:
        torch._assert_async(torch.isfinite(total), message)


def _total(values: torch.Tensor) -> torch.Tensor:
    # half precision overflows in the sum of finite values
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


class MoeTuner(BaseTuner):
    """Base class of the tuners of this package."""

    tags: tuple[str, ...] = ("peft_moe",)
    recorder: RoutingRecorder
    aux_loss: AuxLoss

    def aux_loss_function(self, config: PeftConfig) -> AuxLossFunction | None:
        """Load balancing and z-loss with the coefficients of `config`; `None` if both are 0 or it has none."""
        aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
        z_loss_coef = getattr(config, "router_z_loss_coef", 0.0)
        if not aux_loss_coef and not z_loss_coef:
            return None
        return partial(
            weighted_aux_loss,
            loss_type=config.router_aux_loss_type,
            aux_loss_coef=aux_loss_coef,
            z_loss_coef=z_loss_coef,
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does, with a [`RoutingRecorder`] and an [`AuxLoss`] attached to the base model."""
        self.recorder = install_recorder(model)
        self.aux_loss = install_aux_loss(model, self.recorder)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # a refused adapter leaves the model as it was, unless an earlier adapter still needs the hooks
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                remove_context(model)
            raise
        function = self.aux_loss_function(self.peft_config[adapter_name])
        self.aux_loss.remove(adapter_name)
        if function is not None:
            is_global = getattr(self.peft_config[adapter_name], "router_aux_loss_scope", "process") == "global"
            self.aux_loss.add(adapter_name, function, is_global=is_global)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(list(self.tags))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its auxiliary loss; the same adapters are active in all layers afterwards."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        self.aux_loss.remove(adapter_name)
        if was_active and self.active_adapters:
            # each layer has chosen for itself among those that it has
            is_frozen = all(self.peft_config[name].inference_mode for name in self.active_adapters)
            self.set_adapter(self.active_adapters, inference_mode=is_frozen)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse `adapter_names`, which PEFT drops silently where a tuner does not handle it."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{type(self).__name__} cannot use another adapter for each sample, but got adapter_names="
                f"{kwargs['adapter_names']}. Split the batch, and call set_adapter before each part."
            )
        yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_context(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_state_dict(model, adapter_name, remapped, prefix=cls.prefix)
        return remapped


def check_adapter_state_dict(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], *, prefix: str
) -> None:
    """Compare what a file holds for an adapter with what the model needs, before anything is loaded.

    Args:
        model (`nn.Module`): the model with the adapter injected.
        adapter_name (`str`): its name.
        state_dict (`dict[str, torch.Tensor]`): keys as in the model, values from the file.
        prefix (`str`): what the names of the tuner's containers begin with.

    Raises:
        ValueError: tensors are missing, superfluous, of another shape, no floating-point numbers where the model has
            such, or not finite. A mixture of experts of which only a part is loaded would silently compute something
            else.
    """
    needed = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for name, tensor in layer.state_dict(prefix=f"{layer_name}." if layer_name else "").items():
                own = name.removeprefix(f"{layer_name}.")
                if own.startswith(prefix) and own.split(".")[1] == adapter_name:
                    needed[name] = tensor
    fitting = {name: state_dict[name] for name in needed if name in state_dict}
    missing = [name for name in needed if name not in fitting]
    extra = [name for name in state_dict if name not in needed and f".{prefix}" in name]
    shapes = [
        f"{name}: {tuple(found.shape)} in the file, {tuple(needed[name].shape)} in the model"
        for name, found in fitting.items()
        if found.shape != needed[name].shape
    ]
    dtypes = [
        f"{name}: {found.dtype} in the file, {needed[name].dtype} in the model"
        for name, found in fitting.items()
        if found.is_floating_point() != needed[name].is_floating_point()
    ]
    diverged = [
        name
        for name, found in fitting.items()
        if found.is_floating_point() and not found.is_meta and not _total(found).isfinite()
    ]
    problems = [
        f"{len(found)} tensors {what}, for example {found[0]}"
        for found, what in (
            (missing, "are missing from the file"),
            (extra, "of the file have no place in the model"),
            (shapes, "have another shape"),
            (dtypes, "have a dtype that cannot be converted"),
            (diverged, "hold NaN or infinity"),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"The saved weights do not fit the adapter {adapter_name!r}: " + "; ".join(problems) + ". Nothing was "
            "loaded. Use the base model and the adapter_config.json that the adapter was trained with; if they are "
            "right, the file is incomplete and has to be fetched or saved again."
        )
