"""The suites, as one `unittest.TestCase` per suite and model, and what running a test of one gave."""

from __future__ import annotations

import contextlib
import importlib
import os
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto, processing_auto

from upstream import stand_ins
from upstream.generation import GenerationTesterMixin
from upstream.tester import TESTERS


def shared(module: str) -> Any:
    """A module of transformers' shared tests.

    Raises:
        RuntimeError: The source distribution is not in the cache.
        ImportError: This version of it has no such module.
    """
    return importlib.import_module(f"upstream.transformers_tests.{module}")


MODELS = tuple(TESTERS)


class _Case(unittest.TestCase):
    model: str
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = TESTERS[self.model](self)


def case_of(suite: str, model: str) -> type[unittest.TestCase]:
    """The tests of a suite over a model.

    Raises:
        RuntimeError: The source distribution is not in the cache.
        ImportError, AttributeError: This version of it has no such suite.
    """
    tester = TESTERS[model]
    members = {
        "model": model,
        "all_model_classes": (tester.base_model_class, tester.conditional_generation_class),
        **MEMBERS.get(suite, dict)(),
    }
    return type(f"{model}_{suite}", (*BASES[suite](), _Case), members)


def _modeling() -> tuple[type, ...]:
    # transformers checks that a model that generates has the tests of generation, which are a suite of their own here
    return shared("test_modeling_common").ModelTesterMixin, GenerationTesterMixin


def _configuration() -> tuple[type, ...]:
    config_tester = shared("test_configuration_common").ConfigTester

    def test_of(name: str) -> Any:
        def test(self: Any) -> None:
            config_class = self.model_tester.config_class
            properties = ["image_token_index", "vision_feature_layer", "image_seq_length"]
            settings = {"has_text_modality": False, "common_properties": properties}
            getattr(config_tester(self, config_class=config_class, **settings), name)()

        return test

    names = [name for name in dir(config_tester) if name.startswith(("create_and_test_", "check_"))]
    return (type("ConfigTests", (), {f"test_{name}": test_of(name) for name in names}),)


def _distributed(mixin: str, name: str, prefix: str) -> tuple[type, ...]:
    module = shared(mixin)
    setattr(module, f"{prefix}_DISTRIBUTED_TEST_MODEL_TYPES", None)
    return (getattr(module, name),)


def _tensor_parallel() -> tuple[type, ...]:
    return _distributed("test_tensor_parallel_mixin", "TensorParallelTesterMixin", "TP")


def _expert_parallel() -> tuple[type, ...]:
    own = _distributed("test_expert_parallel_mixin", "ExpertParallelTesterMixin", "EP")
    return own + _tensor_parallel()


def _training_members() -> dict[str, Any]:
    def set_up(self: Any) -> None:
        _Case.setUp(self)
        get_config = self.model_tester.get_config

        def with_vocabulary() -> Any:
            # the test reads it at the top, where text models have it
            config = get_config()
            config.vocab_size = config.text_config.vocab_size
            return config

        self.model_tester.get_config = with_vocabulary

    def trainable(self: Any) -> type:
        return self.model_tester.conditional_generation_class

    return {"setUp": set_up, "_get_trainable_model_class": trainable, "model_tester": None}


def _expert_parallel_members() -> dict[str, Any]:
    def has_plan(self: Any) -> bool:
        # the plan of MoeLlava is the model's, as its text configuration is that of a dense model
        with torch.device("meta"):
            model = self.model_tester.conditional_generation_class(self.model_tester.get_config())
        return any(rule != "replicate" for name, rule in (model._ep_plan or {}).items() if "experts" in name)

    return {"_has_ep_plan": has_plan, "model_tester": None}


def _fsdp_members() -> dict[str, Any]:
    def set_up(self: Any) -> None:
        _Case.setUp(self)
        # the tests draw tokens from as many, and add losses of parts of a batch, which the load-balancing loss is not
        # made for: it is a product of two means over all tokens
        self.model_tester.vocab_size = 256
        if self.model == "moe_llava":
            self.model_tester.fields = {**self.model_tester.fields, "router_aux_loss_coef": 0.0}

    return {"setUp": set_up, "model_tester": None}


BASES = {
    "modeling": _modeling,
    "configuration": _configuration,
    "generation": lambda: (GenerationTesterMixin,),
    "training": lambda: (shared("test_training_mixin").TrainingTesterMixin,),
    "tensor_parallel": _tensor_parallel,
    "expert_parallel": _expert_parallel,
    "fsdp": lambda: _distributed("test_fsdp_mixin", "FSDPTesterMixin", "FSDP"),
}
MEMBERS = {
    # else it goes by a year in the copyright notice of the file
    "modeling": lambda: {"test_can_init_all_missing_weights_before_2023": True},
    "training": _training_members,
    "tensor_parallel": lambda: {"model_tester": None},
    "expert_parallel": _expert_parallel_members,
    "fsdp": _fsdp_members,
}
OWN_PREFIX = {"expert_parallel": "test_ep_"}


def tests_of(suite: str) -> list[str]:
    """The names of a suite's tests, which are the same for every model.

    Raises:
        RuntimeError: The source distribution is not in the cache.
        ImportError, AttributeError: This version of it has no such suite.
    """
    own = set(dir(GenerationTesterMixin)) if suite == "modeling" else set()
    names = unittest.TestLoader().getTestCaseNames(case_of(suite, MODELS[0]))
    return [name for name in names if name not in own and name.startswith(OWN_PREFIX.get(suite, "test_"))]


@dataclass(frozen=True)
class Outcome:
    """What became of a test: `"passed"`, `"failed"` or `"skipped"`, and why."""

    status: str
    detail: str = ""


class _Result(unittest.TestResult):
    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        if issubclass(err[0], pytest.skip.Exception):
            self.addSkip(test, str(err[1]))
        else:
            super().addError(test, err)

    def outcome(self) -> Outcome:
        if self.failures or self.errors:
            return Outcome("failed", "\n".join(text for _, text in self.failures + self.errors))
        whole = [reason for test, reason in self.skipped if isinstance(test, _Case)]
        return Outcome("skipped", whole[0]) if whole else Outcome("passed")


def run(suite: str, model: str, name: str) -> Outcome:
    """Runs one test over one model."""
    torch.manual_seed(0)
    with (
        _moe_llava_known_by_name(),
        _quiet_environment(),
        stand_ins.as_causal_lms() if suite == "fsdp" else contextlib.nullcontext(),
    ):
        return outcome_of(case_of(suite, model)(name))


def outcome_of(case: unittest.TestCase) -> Outcome:
    """Runs a test."""
    result = _Result()
    case.run(result)
    return result.outcome()


@contextlib.contextmanager
def _moe_llava_known_by_name() -> Iterator[None]:
    """The shared tests look for names of classes in tables that `register` of the Auto classes does not reach."""
    with contextlib.ExitStack() as stack:
        for module in (modeling_auto, processing_auto):
            for name, table in vars(module).items():
                if name.endswith("_MAPPING_NAMES") and isinstance(table, dict) and "llava" in table:
                    own = table["llava"] if "Processor" in str(table["llava"]) else f"Moe{table['llava']}"
                    stack.enter_context(mock.patch.dict(table, moe_llava=own))
        yield


@contextlib.contextmanager
def _quiet_environment() -> Iterator[None]:
    """Restores what tests set in the environment and the default dtype."""
    dtype = torch.get_default_dtype()
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
