"""PEFT's test classes with our configurations in their parameters. Nothing is copied: methods are inherited."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import huggingface_hub
import peft
import pytest
import torch

from conformance.peft import cases, expectations
from conformance.peft.cases import Row
from conformance.peft.tiny_checkpoints import MODELS, CustomModels, TakesClusterIds, hub_cache


# names of parameters → their rows
Axes = dict[tuple[str, ...], Callable[[], Iterable[Row]]]


@dataclass(frozen=True)
class _Parameters:
    """What the parameters of a test become, and the marks that they take the place of."""

    names: tuple[str, ...]
    rows: Iterable[Row]
    replaced: Sequence[pytest.Mark] = ()
    is_indirect: bool = False


@dataclass(frozen=True)
class Suite:
    """A module of PEFT's tests.

    Args:
        name (`str`): how it is called here.
        module (`str`): the module.
        axes (`dict`): what the parameters that carry configurations become. Tests without any of them are left out.
        in_lora_s_place (`tuple[str, ...]`):
            Tests that name LoRA, but are about any tuner: patterns of `Class.test`. They run with another class in the
            place of LoRA's.
        further (`tuple[str, ...]`): the same, for tests that run only where time does not matter.
        members (`dict`): what takes the place of members of the classes.
    """

    name: str
    module: str
    axes: Axes = field(default_factory=dict)
    in_lora_s_place: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    members: dict[str, Any] = field(default_factory=dict)

    def classes(self) -> Iterator[type]:
        """The test classes, as pytest collects them.

        Raises:
            RuntimeError: the source distribution is not in the cache.
            ImportError: this version of it has no such module.
        """
        for kind in self._kinds():
            tests = {test: self._adapted(kind, test) for test in dir(kind) if test.startswith("test")}
            if any(tests.values()):
                members = {**tests, **self.members, "source": self._source, "torch_device": "cpu"}
                own_name = f"Test{self.name.title().replace('_', '')}{kind.__name__.removeprefix('Test')}"
                yield type(own_name, (_WithCase, kind), members)

    @property
    def _source(self) -> Any:
        return importlib.import_module("conformance.peft.peft_tests").module(self.module)

    def _kinds(self) -> Iterator[type]:
        for name, kind in vars(self._source).items():
            if inspect.isclass(kind) and kind.__module__ == self._source.__name__ and name.startswith("Test"):
                yield kind

    def _adapted(self, kind: type, name: str) -> Callable[..., Any] | None:
        """A copy of a test with our parameters; `None` if it is left out."""
        test = inspect.getattr_static(kind, name)
        if not inspect.isfunction(test) or not expectations.is_run(self.name, kind.__name__, name):
            return None
        parameters = self._parameters(kind, name)
        if parameters is None:
            return None
        copy = types.FunctionType(test.__code__, test.__globals__, name, test.__defaults__, test.__closure__)
        copy.__kwdefaults__ = test.__kwdefaults__
        copy.__dict__.update(test.__dict__)
        copy.pytestmark = [  # type: ignore[attr-defined]
            mark for mark in getattr(test, "pytestmark", []) if not any(mark is other for other in parameters.replaced)
        ]
        return self._with_rows(copy, parameters)

    def _parameters(self, kind: type, name: str) -> _Parameters | None:
        """`None` for a test that is about one method, or about a model that we have none for."""
        marks = getattr(inspect.getattr_static(kind, name), "pytestmark", [])
        parametrized = {_names(mark): mark for mark in marks if mark.name == "parametrize"}
        carriers = {names: mark for names, mark in parametrized.items() if names in CONFIG_NAMES}
        if not carriers:
            for label, patterns in (("", self.in_lora_s_place), ("further", self.further)):
                if any(fnmatchcase(f"{kind.__name__}.{name}", pattern) for pattern in patterns):
                    rows = [Row(case, label, (case,)) for case in (cases.LORA, cases.MOLE, cases.MOCLE)]
                    return _Parameters(("peft_case",), rows, is_indirect=True)
            return None
        (names, mark), *others = carriers.items()
        if others or not _is_about_many_methods(mark.args[1]):
            return None
        replaced = [mark]
        if ("model_id",) in parametrized:
            names, replaced = ("model_id", *names), [mark, parametrized[("model_id",)]]
        return _Parameters(names, self.axes[names](), replaced) if names in self.axes else None

    def _with_rows(self, test: Callable[..., Any], parameters: _Parameters) -> Callable[..., Any] | None:
        """`None` if a short run has no row of it."""
        chosen = []
        for row in parameters.rows:
            marks = [pytest.mark.peft_tests(self.name, test.__name__, row)]
            if not row.is_in_short_run:
                marks.append(pytest.mark.exhaustive)
            if row.is_in_short_run or not cases.Selection.is_short_run:
                chosen.append(pytest.param(*row.values, id=row.id, marks=marks))
        names = ",".join(parameters.names)
        parametrize = pytest.mark.parametrize(names, chosen, indirect=parameters.is_indirect)
        return parametrize(test) if chosen else None


CONFIG_NAMES = {
    ("config_cls", "config_kwargs"),
    ("test_name", "model_id", "config_cls", "config_kwargs"),
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"),
    ("config_class", "mandatory_kwargs"),
    ("config_class",),
    ("config_cls",),
    ("config",),
    ("config0",),
    ("settings",),
}


def _names(mark: pytest.Mark) -> tuple[str, ...]:
    names = mark.args[0]
    return tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))


def _is_about_many_methods(values: Iterable[Any]) -> bool:
    """Whether LoRA is one of several methods in the values of a parameter."""
    kinds = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple | list):  # a `pytest.param` is a tuple, too
            waiting += value
        elif inspect.isclass(value) and issubclass(value, peft.PeftConfig):
            kinds.add(value)
        elif isinstance(value, peft.PeftConfig):
            kinds.add(type(value))
    return peft.LoraConfig in kinds and len(kinds) > 1


class _WithCase:
    """What surrounds each test: the cache with the models, and what its configuration needs."""

    source: Any

    @pytest.fixture(autouse=True, scope="class")
    def _hub_cache(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache()))
            yield

    @pytest.fixture(autouse=True)
    def peft_case(self, request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """The configuration of the test. What takes LoRA's place has to be used, or nothing was tested."""
        row: Row = request.node.get_closest_marker("peft_tests").args[2]
        loader = getattr(self, "transformers_class", None)
        if getattr(loader, "__name__", "") == "MockTransformerWrapper":
            loader = CustomModels(loader)
        if row.case.gives_cluster_ids and loader is not None:
            loader = TakesClusterIds(loader)
            prepare = self.prepare_inputs_for_testing  # type: ignore[attr-defined]
            self.prepare_inputs_for_testing = lambda: _with_cluster_ids(prepare())
        self.transformers_class = loader
        if hasattr(self, "model_id") and row.model in MODELS:
            self.model_id = row.model
        if not hasattr(request, "param") or row.case is cases.LORA:
            yield row.case
            return
        config = mock.Mock(wraps=row.case.in_lora_s_place)
        monkeypatch.setattr(self.source, "LoraConfig", config)
        yield row.case
        assert config.called


def _with_cluster_ids(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch_size = len(next(iter(inputs.values())))
    return {**inputs, "cluster_ids": torch.arange(batch_size) % cases.SMALL_MOCLE["num_clusters"]}


CHECKPOINT = ("model_id", "config_cls", "config_kwargs")
ADAPTS_LINEARS = (cases.LORA, cases.MOLE, cases.MOCLE)
EVERY_TUNER = (*ADAPTS_LINEARS, cases.MOEXTEND)


@pytest.fixture
def _pixels(self: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, 16, 16)}


SUITES = [
    Suite(
        "decoder",
        "test_decoder_models",
        {
            CHECKPOINT: lambda: cases.on_checkpoints(
                "CAUSAL_LM", ["tiny/gated", "tiny/opt", "tiny/conv1d"], ["tiny/mixtral"]
            )
        },
    ),
    Suite(
        "encoder_decoder",
        "test_encoder_decoder_models",
        {CHECKPOINT: lambda: cases.on_checkpoints("SEQ_2_SEQ_LM", ["tiny/t5", "tiny/bart"])},
    ),
    Suite(
        "feature_extraction",
        "test_feature_extraction_models",
        {CHECKPOINT: lambda: cases.on_checkpoints("FEATURE_EXTRACTION", ["tiny/bert"], ["tiny/mixtral-features"])},
    ),
    Suite(
        "seq_classifier",
        "test_seq_classifier",
        {
            CHECKPOINT: lambda: cases.on_checkpoints(
                "SEQ_CLS", ["tiny/bert-classifier", "tiny/gated-classifier"], ["tiny/mixtral-classifier"]
            )
        },
    ),
    Suite(
        "vision",
        "test_vision_models",
        {
            ("config",): lambda: cases.made(
                cases.ADAPTERS_OF_LINEARS, target_modules=["fc1", "fc2"], modules_to_save=["classifier"]
            )
        },
        members={"model_id": "tiny/vit", "data": _pixels},
    ),
    Suite(
        "custom",
        "test_custom_models",
        {
            ("test_name", "model_id", "config_cls", "config_kwargs"): cases.on_custom_models,
            ("config_cls",): lambda: cases.classes(*ADAPTS_LINEARS),
            ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): cases.two_adapters,
            ("config0",): lambda: cases.made(
                cases.ADAPTERS_OF_LINEARS, target_modules=["lin0"], init_lora_weights=False
            ),
        },
        in_lora_s_place=(
            "TestPeftCustomModel.test_add_adapter_rejects_duplicate_name_without_mutation",
            "TestPeftCustomModel.test_delete_adapter_with_multiple_adapters_works",
            "TestPeftCustomModel.test_delete_adapter_multiple_adapters_with_modules_to_save",
            "TestPeftCustomModel.test_multiple_adapters_no_needless_copy_modules_to_save",
            "TestPeftCustomModel.test_*existing_model_card",
        ),
        further=(
            "TestPeftCustomModel.test_ignore_mismatched_sizes_with_scalar_modules_to_save",
            "TestPeftCustomModel.test_*_similarly_named_sibling",
            "TestPeftCustomModel.test_weight_bias_attributes",
        ),
    ),
    Suite(
        "config",
        "test_config",
        {
            ("config_class", "mandatory_kwargs"): lambda: cases.without_settings(*EVERY_TUNER),
            ("config_class",): lambda: cases.classes(*EVERY_TUNER),
        },
    ),
    Suite("mapping", "test_mapping", in_lora_s_place=("*",)),
    Suite(
        "low_level_api",
        "test_low_level_api",
        {("config",): lambda: cases.made(cases.ADAPTERS_OF_LINEARS)},
        in_lora_s_place=(
            "TestInjectAdapterFromStateDict.test_inject_from_state_dict_transformers",
            "TestInjectAdapterFromStateDict.test_inject_from_state_dict_transformers_irregular_targets",
            "TestInjectAdapterFromStateDict.test_inject_from_state_dict_low_cpu_mem_usage",
            "TestPeftStateDict.test_get_peft_model_state_dict_*",
            "TestPeftStateDict.test_get_and_set_*",
            "TestPeftStateDict.test_set_peft_model_state_dict_preserves_input",
            "TestGetBaseModelStateDict.*",
            "TestStateDictFsdpShapeValidation.test_save_pretrained_succeeds_for_normal_lora",
        ),
        further=(
            "TestInjectAdapterFromStateDict.test_inject_from_state_dict_compiled_model",
            "TestPeftStateDict.test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
        ),
    ),
    Suite(
        "tuners_utils",
        "test_tuners_utils",
        in_lora_s_place=(
            "TestTargetedModuleNames.test_[ot][nw]*",
            "TestExcludedModuleNames.test_[!inr]*",
            "TestExcludedModuleNames.test_no_modules_*",
            "TestModelAndLayerStatus.test_*small",
            "TestModelAndLayerStatus.test_*with_modules_to_save*",
            "TestRankAndAlphaPattern.*",
        ),
        further=(
            "TestTargetedModuleNames.test_layers_to_transform_*",
            "TestModelAndLayerStatus.test_*quantization_backend_[bi]*",
            "TestFindMinimalTargetModules.test_get_peft_modules_module_name_is_suffix_of_another_module",
            "TestTunerStateDictKeyPrefixes.test_*_not_included",
        ),
    ),
    Suite(
        "initialization",
        "test_initialization",
        in_lora_s_place=(
            "TestNoInfiniteRecursionDeepspeed.*",
            "TestCustomModelConfigWarning.*",
            "TestLoraInitialization.test_*pattern*key*",
        ),
        further=(
            "TestLoraInitialization.test_misconfigured_second_adapter_warns_on_add_adapter",
            "TestLoraInitialization.test_rank_alpha_pattern_override",
            "TestNamingConflictWarning.*",
            "TestLoadPeftKeyMapping.test_key_mapping_*_lora",
        ),
    ),
    Suite("torch_compile", "test_torch_compile", {("settings",): cases.compiled}),
]
