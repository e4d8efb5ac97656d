"""The fields that the configurations of tuners with LoRA experts share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..kernels import validate_name
from .config import (
    Count,
    CountByName,
    MoeTunerConfig,
    Names,
    Positive,
    PositiveByName,
    Share,
    Targets,
    is_names,
    must_be,
)


REMOVED_BACKENDS = ("segment",)
"""kernel backends of earlier versions, which a saved adapter may still name"""


def _known_backend(name: str, value: Any) -> list[str]:
    try:
        validate_name(str(value))
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def _is_layers(value: Any) -> bool:
    return all(type(number) is int for number in (value if isinstance(value, list) else [value]))


Layers = Annotated[list[int] | int, must_be("a layer number or a list of them", _is_layers)]
Backend = Annotated[str, _known_backend]


@dataclass
class LoraExpertsConfig(MoeTunerConfig):
    """Fields about LoRA experts. The subclasses describe them; `method` is how a subclass calls itself."""

    num_experts: Count = field(default=4, metadata={"help": "LoRA experts."})
    r: Count = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: Positive = field(default=16, metadata={"help": "Experts are scaled by lora_alpha / r."})
    lora_dropout: Share = field(default=0.05, metadata={"help": "Dropout on the input of the experts."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    target_modules: Targets | None = field(default=None, metadata={"help": "Linears that get experts."})
    rank_pattern: CountByName = field(
        default_factory=dict, metadata={"help": "Other ranks for linears whose name matches."}
    )
    alpha_pattern: PositiveByName = field(
        default_factory=dict, metadata={"help": "Other alphas for linears whose name matches."}
    )
    exclude_modules: Targets | None = field(default=None, metadata={"help": "Linears to leave alone."})
    layers_to_transform: Layers | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: Targets | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts."}
    )
    modules_to_save: Names | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save."}
    )
    init_lora_weights: Literal[True, False, "gaussian"] = field(
        default=True, metadata={"help": "How experts are initialised."}
    )
    kernel_backend: Backend = field(default="auto", metadata={"help": "What computes the experts."})
    checkpoint_format: int = field(default=1, metadata={"help": "Format of the saved adapter; leave as it is."})

    def __post_init__(self) -> None:
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)
        if isinstance(self.layers_to_transform, tuple | set | range):
            self.layers_to_transform = list(self.layers_to_transform)
        if self.kernel_backend in REMOVED_BACKENDS:
            # all backends compute the same, so an adapter of an earlier version must not be lost for the name of one
            warnings.warn(
                f"{type(self).__name__}: kernel_backend={self.kernel_backend!r} was removed from peft_moe, so that "
                "'auto' takes its place, which computes the same. Save the adapter again to be rid of this warning.",
                stacklevel=2,
            )
            self.kernel_backend = "auto"
        super().__post_init__()

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern has no effect without layers_to_transform. Set both or neither.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append(
                "layers_to_transform cannot be combined with a regular expression in target_modules. Put the layer "
                "numbers into the expression, or give target_modules as a list."
            )
        return problems


def as_set(names: Any) -> Any:
    """A list of names without its order, as PEFT keeps it; anything else as it is."""
    return set(names) if isinstance(names, list) and is_names(names) else names
