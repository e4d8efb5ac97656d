"""Which configurations PEFT's tests run over, and on which models. LoRA is the control of every other row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import LoraConfig

from conformance.peft.report import CONTROL
from peft_moe import MoCLEConfig, MoExtendConfig, MoLEConfig
from peft_moe.tuners.mocle.config import RELEASED_CODE


class Selection:
    """What is collected: to name thousands of tests that are then left out takes longer than to run the others."""

    is_short_run = False


@dataclass(frozen=True)
class Case:
    """A configuration.

    Args:
        name (`str`): how the tests call it.
        config_cls (`type`), settings (`dict`): the configuration, but for targets and the task type.
        gives_cluster_ids (`bool`): whether the inputs that a test prepares come with `cluster_ids`.
        in_lora_s_place (`Callable`, *optional*): takes the place of `LoraConfig` in tests that know no other.
    """

    name: str
    config_cls: type
    settings: dict[str, Any] = field(default_factory=dict)
    gives_cluster_ids: bool = False
    in_lora_s_place: Callable[..., Any] | None = None


SMALL_MOCLE = {"num_clusters": 6, "num_experts": 3, "cluster_embedding_dim": 5, "r": 4, "fallback": "universal"}

LORA = Case(CONTROL, LoraConfig, {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}, in_lora_s_place=LoraConfig)
MOLE = Case(
    "mole-top-2",
    MoLEConfig,
    {"num_experts": 4, "top_k": 2, "r": 4},
    in_lora_s_place=partial(MoLEConfig, lora_alpha=8, lora_dropout=0.0, lora_target_modules=None),
)
MOCLE = Case(
    "mocle",
    MoCLEConfig,
    SMALL_MOCLE,
    gives_cluster_ids=True,
    in_lora_s_place=partial(
        MoCLEConfig, **{**SMALL_MOCLE, "r": 8}, lora_alpha=8, lora_dropout=0.0, gate_noise_std=0.0
    ),
)
MOEXTEND = Case("moextend", MoExtendConfig, {"init": "zero_gate"})

ADAPTERS_OF_LINEARS = [
    LORA,
    Case("mole-one-expert", MoLEConfig, {"num_experts": 1, "r": 4}),
    Case("mole-top-1", MoLEConfig, {"num_experts": 3, "top_k": 1, "r": 4, "router_aux_loss_coef": 1.0}),
    MOLE,
    Case(
        "mole-soft-per-linear",
        MoLEConfig,
        {"num_experts": 2, "soft": True, "router_scope": "module", "r": 4, "router_aux_loss_coef": 1.0},
    ),
    MOCLE,
    Case("mocle-released-code", MoCLEConfig, {**SMALL_MOCLE, **RELEASED_CODE}, gives_cluster_ids=True),
    Case("mocle-without-ids", MoCLEConfig, SMALL_MOCLE),
]
NEW_EXPERTS = [
    LORA,
    MOEXTEND,
    Case("moextend-low-rank", MoExtendConfig, {"init": "zero_gate", "expert_type": "lora", "r": 4}),
    Case("moextend-calibrated", MoExtendConfig, {"init": "mean_gate", "calibration": "paper", "num_new_experts": 2}),
]
SHORT_RUN = {
    "tiny/gated": {LORA.name, MOLE.name, MOCLE.name},
    "tiny/mixtral": {LORA.name, MOEXTEND.name},
    "MLP lin0 lin1": {LORA.name, MOLE.name, MOCLE.name},
    "Moe": {LORA.name, MOEXTEND.name},
    "": {LORA.name, MOLE.name, MOCLE.name, MOEXTEND.name},
}


LORA_ON_MIXTRAL = {"target_modules": ["q_proj", "o_proj"]}


@dataclass(frozen=True)
class Row:
    """A configuration on a model.

    Args:
        case (`Case`): the configuration.
        model (`str`): how the tests call the model, `""` where they do not.
        values (`tuple`): of the parameters of the test.
    """

    case: Case
    model: str
    values: tuple[Any, ...]

    @property
    def id(self) -> str:
        """The same up to the colon for every configuration."""
        return f"{self.model}:{self.case.name}"

    @property
    def is_in_short_run(self) -> bool:
        """Whether a test of it runs where time matters."""
        return self.case.name in SHORT_RUN.get(self.model, ())


def on_checkpoints(task_type: str, linears: list[str], mixtures: list[str] | None = None) -> Iterator[Row]:
    """Rows of `model_id, config_cls, config_kwargs`."""
    for model in linears:
        for case in ADAPTERS_OF_LINEARS:
            yield Row(case, model, (model, case.config_cls, {**case.settings, "task_type": task_type}))
    for model in mixtures or []:
        for case in NEW_EXPERTS:
            targets = LORA_ON_MIXTRAL if case is LORA else {}
            yield Row(case, model, (model, case.config_cls, {**case.settings, **targets, "task_type": task_type}))


CUSTOM_TARGETS: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP lin0", "MLP", {"target_modules": "lin0"}),
    ("MLP lin0 lin1", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP and a module to save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D conv1d", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D lin0", "EmbConv1D", {"target_modules": ["lin0"]}),
]
LORA_ON_MOE = {"target_modules": ["lin0", "lin1"]}


def on_custom_models() -> Iterator[Row]:
    """Rows of `test_name, model_id, config_cls, config_kwargs`."""
    for name, model, targets in CUSTOM_TARGETS:
        for case in ADAPTERS_OF_LINEARS:
            yield Row(case, name, (name, model, case.config_cls, {**case.settings, **targets}))
    for case in NEW_EXPERTS:
        targets = LORA_ON_MOE if case is LORA else {}
        yield Row(case, "Moe", ("Moe", "Moe", case.config_cls, {**case.settings, **targets}))


def without_settings(*cases: Case) -> Iterator[Row]:
    """Rows of a configuration class and what it must be given."""
    for case in cases:
        yield Row(case, "", (case.config_cls, {}))


def classes(*cases: Case) -> Iterator[Row]:
    """Rows of a configuration class."""
    for case in cases:
        yield Row(case, "", (case.config_cls,))


def two_adapters() -> Iterator[Row]:
    """Rows of `test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2`."""
    for name, second in (("same", "lin0"), ("different", "lin1")):
        for case in ADAPTERS_OF_LINEARS:
            settings = {**case.settings, "init_lora_weights": False, "lora_alpha": 4}
            kwargs = [{**settings, "target_modules": [target]} for target in ("lin0", second)]
            yield Row(case, name, (name, case.config_cls.__name__, case.config_cls, *kwargs))


def made(cases: list[Case], **settings: Any) -> Iterator[Row]:
    """Rows of a configuration, made."""
    for case in cases:
        yield Row(case, "", (case.config_cls(**{**case.settings, **settings}),))


def compiled() -> Iterator[Row]:
    """Rows of a configuration, made, and how to compile: without writing any C++, which takes long."""
    on_models = [(case, "compiled", {}) for case in ADAPTERS_OF_LINEARS]
    on_models += [(LORA, "tiny/mixtral-compiled", LORA_ON_MIXTRAL), (MOEXTEND, "tiny/mixtral-compiled", {})]
    for case, model, targets in on_models:
        config = case.config_cls(task_type="CAUSAL_LM", **case.settings, **targets)
        yield Row(case, model, ((config, {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}),))
