"""What PEFT's tests import or fetch and is not here: diffusers, data sets and the Hub."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import datasets


@contextmanager
def needed_by_imports() -> Iterator[None]:
    """While a module of PEFT's tests is imported: it asks for classes of diffusers, and for leave to be slow."""
    has_diffusers = importlib.util.find_spec("diffusers") is not None
    if not has_diffusers:
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].__version__ = "0"  # type: ignore[attr-defined]
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    try:
        with mock.patch.dict(os.environ, PEFT_DEBUG_WITH_TORCH_COMPILE="1"):
            yield
    finally:
        if not has_diffusers:
            del sys.modules["diffusers"]


def put_into(testing_utils: Any) -> None:
    """Replaces what the other modules are going to import from `testing_utils`."""
    testing_utils.torch_device = "cpu"
    testing_utils.hub_online_once = hub_online_once
    testing_utils.load_cat_image = lambda: None
    testing_utils.load_dataset_english_quotes = english_quotes
    testing_utils.set_init_weights_false = _for_our_configs_too(testing_utils.set_init_weights_false)


@contextmanager
def hub_online_once(model_id: str) -> Iterator[None]:
    """Nothing is fetched: each model is a folder."""
    yield


@functools.cache
def english_quotes() -> datasets.DatasetDict:
    """Forty sentences of the tiny vocabulary, with the columns of the data set that the tests ask for."""
    words = "abcdefghijklmnopqrstuvwxyz"
    quotes = [" ".join((2 * words)[start % 26 :][: 5 + start % 4]) for start in range(40)]
    columns = {"quote": quotes, "author": ["nobody"] * 40, "tags": [[]] * 40}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


def _for_our_configs_too(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def set_init_weights_false(config_cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Let an adapter change the output from the start."""
        if not config_cls.__module__.startswith("peft_moe."):
            return original(config_cls, kwargs)
        if "init_lora_weights" in {field.name for field in fields(config_cls)}:
            return {**kwargs, "init_lora_weights": False}
        return dict(kwargs)

    return set_init_weights_false
