"""Lets the base model take `cluster_ids`, by `forward` and by `generate`, under trainers that look at its signature."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ...routing_recorder import RoutingRecorder, get_recorder
from ...sequence_state import of_continued_cache
from .clusters import CLUSTER_IDS, GENERATION_PROMPT, remember_clusters


_METHODS = ("forward", "generate")
_MARK = "_is_mocle_entrance"
_PASSED_ON = ("input_ids", "attention_mask", "position_ids")


def open_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Make `forward` and `generate` of `base_model` accept `cluster_ids`; calling it again does nothing.

    The ids go to the routers through the recorder and never reach the model itself. `forward` gets a signature that
    names them, for `Trainer` drops the columns of a dataset that it does not find there. Pickle keeps no method of an
    instance: a whole model that went through `torch.save` takes `cluster_ids` in its call, but not in `generate`.
    """
    recorder.context.extra_inputs.add(CLUSTER_IDS)
    if remember_clusters not in recorder.context.output_hooks:
        recorder.context.output_hooks.append(remember_clusters)
    for name in _METHODS:
        if hasattr(base_model, name) and not _is_ours(base_model, name) and not _is_ours(base_model, f"_old_{name}"):
            # a method of the instance, and none that holds the instance: copies of the model must call themselves
            base_model.__dict__[_before(name)] = base_model.__dict__.get(name)
            base_model.__dict__[name] = _METHOD_MAKERS[name](base_model)


def close_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Undo [`open_entrance`]. Where accelerate has put a hook around our method it stays, and only passes on."""
    recorder.context.extra_inputs.discard(CLUSTER_IDS)
    if remember_clusters in recorder.context.output_hooks:
        recorder.context.output_hooks.remove(remember_clusters)
    for name in _METHODS:
        if _is_ours(base_model, f"_old_{name}"):
            continue
        before = base_model.__dict__.pop(_before(name), None)
        if _is_ours(base_model, name):
            del base_model.__dict__[name]
            if before is not None:
                base_model.__dict__[name] = before


def _is_ours(model: nn.Module, attribute: str) -> bool:
    """Whether an attribute of the instance is one of the methods below; accelerate keeps what it hooks as `_old_…`."""
    return hasattr(model.__dict__.get(attribute), _MARK)


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
        recorder = get_recorder(self)
        if cluster_ids is None or recorder is None:
            return _call_inner(self, "forward", *args, **kwargs)
        # called without hooks: model.forward(...)
        inputs = {name: kwargs[name] for name in _PASSED_ON if name in kwargs}
        with recorder.surround({**inputs, CLUSTER_IDS: cluster_ids}):
            return _call_inner(self, "forward", *args, **kwargs)

    setattr(forward, _MARK, True)
    forward.__signature__ = _with_cluster_ids(inspect.signature(model.forward))  # type: ignore[attr-defined]
    return forward.__get__(model)


def _generate_method(model: nn.Module) -> Any:
    signature = inspect.signature(model.generate)

    def generate(self: nn.Module, *args: Any, cluster_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        recorder = get_recorder(self)
        if recorder is None:
            return _call_inner(self, "generate", *args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        prompt = {name: given.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds")}
        if prompt["input_ids"] is None and getattr(given.get("inputs"), "dtype", None) in (torch.int64, torch.int32):
            prompt["input_ids"] = given["inputs"]
        continued = of_continued_cache(given.get("past_key_values"))
        with recorder.surround({CLUSTER_IDS: cluster_ids, GENERATION_PROMPT: prompt, **continued}):
            return _call_inner(self, "generate", *args, **kwargs)

    setattr(generate, _MARK, True)
    generate.__signature__ = _with_cluster_ids(signature)  # type: ignore[attr-defined]
    generate.__doc__ = model.generate.__doc__
    return generate.__get__(model)


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
