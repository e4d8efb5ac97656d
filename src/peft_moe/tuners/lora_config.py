"""What the configurations of tuners with LoRA experts share: fields, and the words for what is wrong with them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..kernels import validate_name
from .base import MoeTunerConfig, check_checkpoint_format, raise_config_problems
from .registration import peft_type


FLOAT32_MAX = 3.4028234663852886e38


@dataclass
class LoraExpertsConfig(MoeTunerConfig):
    """Fields about LoRA experts. The subclasses describe them; `method` is how a subclass calls itself."""

    num_experts: int = field(default=4, metadata={"help": "LoRA experts."})
    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Experts are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the experts."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linears that get experts."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for linears whose name matches."}
    )
    alpha_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other alphas for linears whose name matches."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Linears to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save."}
    )
    init_lora_weights: bool | Literal["gaussian"] = field(
        default=True, metadata={"help": "How experts are initialised."}
    )
    kernel_backend: str = field(default="auto", metadata={"help": "What computes the experts."})
    checkpoint_format: int = field(default=1, metadata={"help": "Format of the saved adapter; leave as it is."})

    name_fields: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    flag_fields: ClassVar[tuple[str, ...]] = ("use_rslora",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method.upper())
        check_checkpoint_format(self.checkpoint_format, method=self.method)
        for name in self.pattern_fields:
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name in self.name_fields:
            value = getattr(self, name)
            if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
                setattr(self, name, set(value))
        raise_config_problems(type(self).__name__, [*self._problems(), *self._shared_problems()])

    def _problems(self) -> list[str]:
        """Everything that is wrong with the fields of the subclass, in words that say what to do."""
        return []

    def _shared_problems(self) -> list[str]:
        problems = self._type_problems()
        for name in self.pattern_fields:
            pattern = getattr(self, name)
            for key, value in (pattern if isinstance(pattern, dict) else {}).items():
                problems += _pattern_problems(name, key, value)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be in [0, 1), but is {self.lora_dropout!r}.")
        if not is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha must be a positive number, but is {self.lora_alpha!r}.")
        problems += choice_problems(self, {"init_lora_weights": (True, False, "gaussian")})
        try:
            validate_name(str(self.kernel_backend))
        except ValueError as error:
            problems.append(f"kernel_backend: {error}")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern has no effect without layers_to_transform. Set both or neither.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append(
                "layers_to_transform cannot be combined with a regular expression in target_modules. Put the layer "
                "numbers into the expression, or give target_modules as a list."
            )
        return problems

    def _type_problems(self) -> list[str]:
        """Fields of a type that nothing can be made of."""
        problems = [
            f"{name} must be True or False, but is {getattr(self, name)!r}."
            for name in self.flag_fields
            if not isinstance(getattr(self, name), bool)
        ]
        problems += [
            f"{name} must be a dictionary from names to numbers, but is {getattr(self, name)!r}."
            for name in self.pattern_fields
            if not isinstance(getattr(self, name), dict)
        ]
        for name in (*self.name_fields, "layers_pattern"):
            problems += name_problems(self, name)
        problems += name_problems(self, "modules_to_save", may_be_pattern=False)
        layers = self.layers_to_transform
        if isinstance(layers, tuple | set | range):
            layers = self.layers_to_transform = list(layers)
        numbers = layers if isinstance(layers, list) else [layers]
        if layers is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            problems.append(f"layers_to_transform must be a layer number or a list of them, but is {layers!r}.")
        return problems


def is_positive_int(value: Any) -> bool:
    """Whether a field counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a field can be calculated with in float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def name_problems(config: Any, name: str, *, may_be_pattern: bool = True) -> list[str]:
    """A sentence if a field that may be `None` is no list of names and, where it may be, no regular expression."""
    value = getattr(config, name)
    if value is None:
        return []
    if isinstance(value, str) and may_be_pattern:
        try:
            re.compile(value)
        except re.error as error:
            return [f"{name} is {value!r}, which is no regular expression: {error}."]
        return []
    if not isinstance(value, list | set | tuple) or not all(isinstance(entry, str) for entry in value):
        return [f"{name} must be a list of names, but is {value!r}."]
    return []


def count_problems(config: Any, *names: str) -> list[str]:
    """A sentence for each of these fields that is no positive whole number."""
    return [
        f"{name} must be a whole number of at least 1, but is {getattr(config, name)!r}."
        for name in names
        if not is_positive_int(getattr(config, name))
    ]


def choice_problems(config: Any, choices: dict[str, tuple[Any, ...]]) -> list[str]:
    """A sentence for each of these fields that is none of its allowed values."""
    return [
        f"{name} must be one of {', '.join(map(repr, allowed))}, but is {getattr(config, name)!r}."
        for name, allowed in choices.items()
        if getattr(config, name) not in allowed
    ]


def float32_problems(config: Any, name: str) -> list[str]:
    """A sentence if a router is asked to compute in anything but float32."""
    if str(getattr(config, name)).removeprefix("torch.") == "float32":
        return []
    return [
        f"{name} must be 'float32', but is {getattr(config, name)!r}: a router in lower precision ties and flips "
        "experts. Leave the field out; the experts themselves follow the dtype of the model."
    ]


def _pattern_problems(name: str, key: Any, value: Any) -> list[str]:
    problems = []
    if name == "alpha_pattern":
        if not is_number(value) or not value > 0:
            problems.append(f"{name}[{key!r}] must be a positive number, but is {value!r}.")
    elif not is_positive_int(value):
        problems.append(f"{name}[{key!r}] must be at least 1, but is {value!r}.")
    try:
        re.compile(key)
    except (re.error, TypeError) as error:
        problems.append(f"{name} has the key {key!r}, which is no regular expression: {error}.")
    return problems
