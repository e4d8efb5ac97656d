"""Puts a model back as it was, to the bit, after something has trained a few of its parameters."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig


PLAIN_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """What a model is at this moment, to go back to.

    Remembered by value: the parameters that will be trained, all buffers, and configurations. Remembered by reference:
    the memory of each parameter, its `.grad` and whether it requires one, and every other attribute of every module (hooks,
    training mode, a patched `forward`, gradient checkpointing). Weights that nobody trains are not copied.

    Args:
        model (`nn.Module`): stays the same object; so do its parameters and buffers.
        trained (`Iterable[nn.Parameter]`): the parameters whose values may change.
    """

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        self.model = model
        self.keeps_trained = False
        """whether [`restore`] leaves the trained parameters with the values that they have then"""
        self._trained = [(parameter, parameter.detach().clone()) for parameter in trained]
        self._buffers = [(buffer, buffer.data, buffer.detach().clone()) for buffer in model.buffers()]
        self._parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
        self._attributes = [(module, _copied(module.__dict__)) for module in model.modules()]
        self._configs = [(config, _copied(config.__dict__)) for config in configs_of(model)]

    def changed(self) -> set[int]:
        """`id` of each trained parameter whose values are others now."""
        return {id(parameter) for parameter, value in self._trained if not torch.equal(parameter.to(value), value)}

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        trained = self._trained
        if self.keeps_trained:
            trained = [(parameter, parameter.detach().clone()) for parameter, _ in trained]
        for module, attributes in self._attributes:
            _put_back(module.__dict__, attributes)
        for config, attributes in self._configs:
            _put_back(config.__dict__, attributes)
        for parameter, data, requires_grad, gradient in self._parameters:
            parameter.grad = None
            parameter.data = data  # where it was, should a trainer have moved it to another device
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for buffer, data, value in self._buffers:
            buffer.data = data
            buffer.copy_(value)
        for parameter, value in trained:
            parameter.copy_(value)


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations that the modules of a model hold, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in module.__dict__.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig | GenerationConfig) and id(value) not in found:
            found[id(value)] = value
            waiting += value.__dict__.values()
    return list(found.values())


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a shallow copy of it, where it is a plain container."""
    return {
        name: (value, copy.copy(value) if type(value) in PLAIN_CONTAINERS else None)
        for name, value in attributes.items()
    }


def _put_back(attributes: dict[str, Any], remembered: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, content) in remembered.items():
        if content is not None and isinstance(value, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
        attributes[name] = value


@contextmanager
def same_random_state() -> Iterator[None]:
    """Whatever happens inside, Python, numpy and torch (on all CUDA devices) then go on drawing as if it had not."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
