"""Lets the base model take `cluster_ids`, by `forward` and by `generate`, under trainers that look at its signature."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ...recording import RoutingRecorder, get_recorder
from .clusters import CLUSTER_IDS, GENERATION_PROMPT, remember_clusters


_METHODS = ("forward", "generate")


def open_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Make `forward` and `generate` of `base_model` accept `cluster_ids`; calling it again does nothing.

    The ids go to the routers through the recorder and never reach the model itself. `forward` gets a signature that
    names them, for `Trainer` drops the columns of a dataset that it does not find there. Pickle keeps no method of an
    instance: a whole model that went through `torch.save` takes `cluster_ids` in its call, but not in `generate`.
    """
    recorder.router_inputs.add(CLUSTER_IDS)
    if remember_clusters not in recorder.output_hooks:
        recorder.output_hooks.append(remember_clusters)
    for name in _METHODS:
        if hasattr(base_model, name) and _before(name) not in base_model.__dict__:
            # a method of the instance, and none that holds the instance: copies of the model must call themselves
            base_model.__dict__[_before(name)] = base_model.__dict__.get(name)
            base_model.__dict__[name] = _METHOD_MAKERS[name](base_model)


def close_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Undo [`open_entrance`]."""
    recorder.router_inputs.discard(CLUSTER_IDS)
    if remember_clusters in recorder.output_hooks:
        recorder.output_hooks.remove(remember_clusters)
    for name in _METHODS:
        if _before(name) in base_model.__dict__:
            before = base_model.__dict__.pop(_before(name))
            del base_model.__dict__[name]
            if before is not None:
                base_model.__dict__[name] = before


def _before(name: str) -> str:
    return f"_mocle_{name}_before"


def _call_inner(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that was there before: one set on the instance (by trl, accelerate), or that of the class.

    Not by way of a bound method: a compiler that stops in the middle would look it up by its name again and find ours.
    """
    before = model.__dict__.get(_before(name))
    return before(*args, **kwargs) if before is not None else getattr(type(model), name)(model, *args, **kwargs)


def _forward_method(model: nn.Module) -> Any:
    def forward(self: nn.Module, *args: Any, cluster_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if cluster_ids is None:
            return _call_inner(self, "forward", *args, **kwargs)
        with _recorder_of(self).surround({CLUSTER_IDS: cluster_ids}):  # called without hooks: model.forward(...)
            return _call_inner(self, "forward", *args, **kwargs)

    forward.__signature__ = _with_cluster_ids(inspect.signature(model.forward))  # type: ignore[attr-defined]
    return forward.__get__(model)


def _generate_method(model: nn.Module) -> Any:
    signature = inspect.signature(model.generate)

    def generate(self: nn.Module, *args: Any, cluster_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        prompt = {name: given.get(name) for name in ("input_ids", "attention_mask")}
        if prompt["input_ids"] is None and getattr(given.get("inputs"), "dtype", None) in (torch.int64, torch.int32):
            prompt["input_ids"] = given["inputs"]
        with _recorder_of(self).surround({CLUSTER_IDS: cluster_ids, GENERATION_PROMPT: prompt}):
            return _call_inner(self, "generate", *args, **kwargs)

    generate.__signature__ = _with_cluster_ids(signature)  # type: ignore[attr-defined]
    generate.__doc__ = model.generate.__doc__
    return generate.__get__(model)


def _recorder_of(model: nn.Module) -> RoutingRecorder:
    recorder = get_recorder(model)
    assert recorder is not None, "the entrance is closed when the recorder goes"
    return recorder


_METHOD_MAKERS = {"forward": _forward_method, "generate": _generate_method}


def _with_cluster_ids(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a bound method, with `self` and with `cluster_ids` as its last named argument."""
    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ids = inspect.Parameter(
        CLUSTER_IDS, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.LongTensor | None"
    )
    parameters = [p for p in signature.parameters.values() if p.name != CLUSTER_IDS]
    is_last = [p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters]
    position = is_last.index(True) if True in is_last else len(parameters)
    return signature.replace(parameters=[myself, *parameters[:position], ids, *parameters[position:]])
