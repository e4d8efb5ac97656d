"""`MoExtendConfig`: what a user chooses about the new experts of a pretrained mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from ..config import Count, MoeTunerConfig, Names, NotNegative, Positive, Targets, is_number, is_positive_int, must_be
from ..lora_config import as_set


def _is_position(value: Any) -> bool:
    return type(value) is int and value >= 0


def _layer_numbers(name: str, layers: Any) -> list[str]:
    return [
        f"{name} must name layers by their number, counted from 0, but has {layer!r}."
        for layer in layers
        if not _is_position(layer)
    ]


def _layers(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple | set):
        return [f"{name} must be a list of layer numbers, but is {value!r}."]
    if not value:
        return [f"{name} is empty, so no layer would get an expert. Leave it out for all layers."]
    return _layer_numbers(name, value)


def _new_experts(name: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return must_be("a whole number of at least 1", is_positive_int)(name, value)
    if not value:
        return [f"{name} is an empty dictionary, so no layer would get an expert. Name at least one layer."]
    problems = [
        f"{name}[{layer!r}] must be a whole number of at least 1, but is {count!r}. Leave out layers that get none."
        for layer, count in value.items()
        if not is_positive_int(count)
    ]
    return problems + _layer_numbers(name, value)


def _sources(name: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [f"{name} must be a dictionary {{layer: expert}}, but is {value!r}."]
    problems = _layer_numbers(name, value)
    for layer, source in value.items():
        if not all(map(_is_position, source if isinstance(source, list | tuple) else [source])):
            problems.append(f"{name}[{layer!r}] must be the number of an expert, but is {source!r}.")
    return problems


NewExperts = Annotated[int | dict[int, int], _new_experts]
Layers = Annotated[list[int], _layers]
Sources = Annotated[dict[int, Any], _sources]
NotPositive = Annotated[float, must_be("a number of at most 0", lambda value: is_number(value) and value <= 0)]


@dataclass
class MoExtendConfig(MoeTunerConfig):
    """Configuration of a [`MoExtendModel`]: layers of a pretrained mixture of experts get new experts.

    After MoExtend (https://huggingface.co/papers/2408.03511). The old experts, the old rows of the routers and all else
    stay as they are, to the bit; only the new experts, their rows in the routers and the calibration train and are saved.

    Args:
        num_new_experts (`int` or `dict[int, int]`):
            New experts per layer, or {layer: new experts}. Paper: 1, in half of the layers.
        layers (`list[int]`, *optional*):
            Layers that get new experts, counted as in the model, from 0. By default every layer that has experts.
        init (`"copy"`, `"copy_guarded"`, `"zero_gate"` or `"mean_gate"`):
            How a new expert and its row in the router begin. The expert is always a copy of its source. `"copy"` (default,
            paper): so is the row. The copy ties with its source, so tokens that have the source at rank 1 lose another
            expert to the copy. `"copy_guarded"`: the row is copied, and a learnable offset of its logit begins at
            `guard_offset`, so that no token chooses the new expert and outputs are those of the base model. An expert
            that is never chosen does not train, and at -17 the load-balancing loss does not change that: see
            `guard_offset`. `"zero_gate"`: the row is 0. `"mean_gate"`: it is the mean of the old rows. Corrections, which
            are added to the scores for the choice in some families, begin as the mean of the old ones for both, as the
            lowest for `"copy_guarded"`.
        copy_sources (`dict[int, int]` or `dict[int, list[int]]`, *optional*):
            {layer: expert that is copied}, or a list with one expert for each new one. Paper: the expert that was chosen
            most often on the new domain. By default expert 0, with a warning.
        guard_offset (`float`):
            Where the offset of `"copy_guarded"` begins. At -17 the new expert takes less than 1e-7 of a softmax, and its
            gradient is lost in the epsilon of Adam: nothing learns. A sigmoid scores it by itself, 1e-4 where the logit of
            its source is 8: take a lower offset for logits of that size. To train, take one that is smaller in size (-8)
            and a `router_aux_loss_coef` above 0, whose loss then raises the offset.
        expert_type (`"ffn"` or `"lora"`):
            A new expert is a full FFN (paper), or the frozen source plus a trained difference of rank `r`.
        r (`int`):
            Rank of the difference, for `expert_type="lora"`.
        lora_alpha (`float`):
            The difference is scaled by `lora_alpha / r`.
        calibration (`"released_code"` or `"paper"`, *optional*):
            Corrects the weights of the chosen experts, not the choice. `"released_code"`: `w = q / Σ q` over the chosen
            experts, `q = p + MLP(p)` for the probabilities `p` of all experts. `"paper"` (eq. 10): `w · (1 + MLP(x))`. Both
            begin as the identity. Off by default; the paper has no run without it.
        calibration_dim (`int`):
            Width inside the calibration's MLP. Released code: 16.
        router_aux_loss_coef (`float`):
            Weight of the load-balancing loss of the extended layers, over old and new experts. Paper: 0.001. 0 turns it
            off.
        router_aux_loss_type (`"switch"`, `"pooled"` or `"mole"`):
            Its form, see [`~peft_moe.aux_loss.load_balancing_loss`]. Only `"switch"` allows layers with different numbers of
            experts.
        router_aux_loss_scope (`"process"` or `"global"`):
            Whose tokens are balanced in a distributed run: those of each process by itself, or those of all processes in
            the same forward pass, by two small all-reduces. `"global"` lets a process specialise on the kind of data that
            it happens to get, and is not for `"mole"`, which balances each sample by itself.
        router_z_loss_coef (`float`):
            Weight of the router z-loss. 0 turns it off.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save, e.g. a multi-modal projector (released code: trained).
        target_modules (`list[str]`, *optional*):
            Filled in by the tuner: the routers and experts that it found. What a user writes here is replaced.
        base_num_experts (`dict[int, int]`, *optional*):
            Filled in by the tuner: {layer: experts of the base model}, so that another base model is noticed.
        base_router (`str`, *optional*):
            Filled in by the tuner: the class of the routers, so that another family is noticed.
        checkpoint_format (`int`):
            Format of the saved adapter; leave as it is.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from peft_moe import MoExtendConfig

    >>> config = MoExtendConfig(layers=[8, 9, 10], copy_sources={8: 3, 9: 0, 10: 5}, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)
    ```

    Raises:
        ValueError: one or more fields do not make sense; all of them are named.
    """

    num_new_experts: NewExperts = field(default=1, metadata={"help": "New experts per layer."})
    layers: Layers | None = field(default=None, metadata={"help": "Layers that get new experts."})
    init: Literal["copy", "copy_guarded", "zero_gate", "mean_gate"] = field(
        default="copy", metadata={"help": "How a new expert and its row in the router begin."}
    )
    copy_sources: Sources | None = field(default=None, metadata={"help": "{layer: expert that is copied}."})
    guard_offset: NotPositive = field(default=-17.0, metadata={"help": "Where the offset of copy_guarded begins."})
    expert_type: Literal["ffn", "lora"] = field(
        default="ffn", metadata={"help": "Full new experts, or low-rank differences to their source."}
    )
    r: Count = field(default=16, metadata={"help": "Rank of the difference."})
    lora_alpha: Positive = field(default=32, metadata={"help": "The difference is scaled by lora_alpha / r."})
    calibration: Literal["released_code", "paper"] | None = field(
        default=None, metadata={"help": "Corrects the weights of the chosen experts."}
    )
    calibration_dim: Count = field(default=16, metadata={"help": "Width inside the calibration's MLP."})
    router_aux_loss_coef: NotNegative = field(default=0.001, metadata={"help": "Weight of the load-balancing loss."})
    router_aux_loss_type: Literal["switch", "pooled", "mole"] = field(
        default="switch", metadata={"help": "Form of the load-balancing loss."}
    )
    router_aux_loss_scope: Literal["process", "global"] = field(
        default="process", metadata={"help": "Balance the tokens of each process, or those of all processes."}
    )
    router_z_loss_coef: NotNegative = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    modules_to_save: Names | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save."}
    )
    target_modules: Targets | None = field(default=None, metadata={"help": "Filled in by the tuner."})
    base_num_experts: dict[int, int] | None = field(
        default=None, metadata={"help": "{layer: experts of the base model}, filled in by the tuner."}
    )
    base_router: str | None = field(default=None, metadata={"help": "Filled in by the tuner."})
    checkpoint_format: int = field(default=1, metadata={"help": "Format of the saved adapter; leave as it is."})

    method: ClassVar[str] = "MoExtend"
    paper_url: ClassVar[str] = "https://huggingface.co/papers/2408.03511"
    card_fields: ClassVar[tuple[str, ...]] = (
        "num_new_experts",
        "base_num_experts",
        "init",
        "expert_type",
        "calibration",
    )

    def __post_init__(self) -> None:
        # JSON knows no whole numbers as keys
        self.num_new_experts = _with_int_keys(self.num_new_experts)
        self.copy_sources = _with_int_keys(self.copy_sources)
        self.base_num_experts = _with_int_keys(self.base_num_experts)
        self.target_modules = as_set(self.target_modules)
        super().__post_init__()

    def num_new_experts_in(self, layer: int) -> int:
        """How many new experts a layer gets; 0 where it is not extended."""
        if isinstance(self.num_new_experts, dict):
            return self.num_new_experts.get(layer, 0)
        return self.num_new_experts if self.layers is None or layer in self.layers else 0

    def sources_in(self, layer: int) -> list[int]:
        """Which expert each new one of a layer copies."""
        num_new = self.num_new_experts_in(layer)
        source = (self.copy_sources or {}).get(layer, 0)
        return list(source) if isinstance(source, list | tuple) else [source] * num_new

    def wanted_layers(self) -> list[int] | None:
        """The layers that are named, `None` for all."""
        return list(self.num_new_experts) if isinstance(self.num_new_experts, dict) else self.layers

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        counts = self.num_new_experts if isinstance(self.num_new_experts, dict) else {}
        if counts and self.layers is not None:
            problems.append("layers has no effect beside a dictionary in num_new_experts, whose keys are the layers.")
        if len(set(counts.values())) > 1 and self.router_aux_loss_coef and self.router_aux_loss_type != "switch":
            problems.append(
                f"router_aux_loss_type={self.router_aux_loss_type!r} pools all routers and needs the same number of "
                "experts everywhere. Use 'switch' where num_new_experts differs by layer."
            )
        problems += [
            f"copy_sources[{layer!r}] names {len(source)} experts, but the layer gets {self.num_new_experts_in(layer)} new "
            "ones. Name one source for each, or a single one for all."
            for layer, source in (self.copy_sources or {}).items()
            if isinstance(source, list | tuple) and len(source) != self.num_new_experts_in(layer)
        ]
        return problems


def _with_int_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in value.items()}
