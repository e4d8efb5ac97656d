"""`MoExtendConfig`: what a user chooses about the new experts of a pretrained mixture of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...aux_loss import AUX_LOSS_TYPES, SCOPES
from ..base import MoeTunerConfig, check_checkpoint_format, raise_config_problems
from ..experts_config import choice_problems, count_problems, is_number, is_positive_int, name_problems
from ..registration import peft_type


INITS = ("copy", "copy_guarded", "zero_gate", "mean_gate")
EXPERT_TYPES = ("ffn", "lora")
CALIBRATIONS = (None, "released_code", "paper")


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

    num_new_experts: int | dict[int, int] = field(default=1, metadata={"help": "New experts per layer."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers that get new experts."})
    init: Literal["copy", "copy_guarded", "zero_gate", "mean_gate"] = field(
        default="copy", metadata={"help": "How a new expert and its row in the router begin."}
    )
    copy_sources: dict[int, Any] | None = field(default=None, metadata={"help": "{layer: expert that is copied}."})
    guard_offset: float = field(default=-17.0, metadata={"help": "Where the offset of copy_guarded begins."})
    expert_type: Literal["ffn", "lora"] = field(
        default="ffn", metadata={"help": "Full new experts, or low-rank differences to their source."}
    )
    r: int = field(default=16, metadata={"help": "Rank of the difference."})
    lora_alpha: float = field(default=32, metadata={"help": "The difference is scaled by lora_alpha / r."})
    calibration: Literal["released_code", "paper"] | None = field(
        default=None, metadata={"help": "Corrects the weights of the chosen experts."}
    )
    calibration_dim: int = field(default=16, metadata={"help": "Width inside the calibration's MLP."})
    router_aux_loss_coef: float = field(default=0.001, metadata={"help": "Weight of the load-balancing loss."})
    router_aux_loss_type: Literal["switch", "pooled", "mole"] = field(
        default="switch", metadata={"help": "Form of the load-balancing loss."}
    )
    router_aux_loss_scope: Literal["process", "global"] = field(
        default="process", metadata={"help": "Balance the tokens of each process, or those of all processes."}
    )
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save."}
    )
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Filled in by the tuner."})
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
        super().__post_init__()
        self.peft_type = peft_type(self.method.upper())
        check_checkpoint_format(self.checkpoint_format, method=self.method)
        # JSON knows no whole numbers as keys
        self.num_new_experts = _with_int_keys(self.num_new_experts)
        self.copy_sources = _with_int_keys(self.copy_sources)
        self.base_num_experts = _with_int_keys(self.base_num_experts)
        if isinstance(self.target_modules, list) and not name_problems(self, "target_modules"):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        raise_config_problems(type(self).__name__, self._problems())

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

    def _problems(self) -> list[str]:
        problems = [*self._count_problems(), *self._layer_problems(), *self._source_problems()]
        problems += count_problems(self, "r", "calibration_dim")
        problems += name_problems(self, "target_modules")
        problems += name_problems(self, "modules_to_save", may_be_pattern=False)
        if not is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha must be a positive number, but is {self.lora_alpha!r}.")
        if not is_number(self.guard_offset) or not -math.inf < self.guard_offset <= 0:
            problems.append(f"guard_offset must be a number of at most 0, but is {self.guard_offset!r}.")
        problems += [
            f"{name} must be a number and not negative, but is {getattr(self, name)!r}."
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < math.inf)
        ]
        problems += choice_problems(
            self,
            {
                "init": INITS,
                "expert_type": EXPERT_TYPES,
                "calibration": CALIBRATIONS,
                "router_aux_loss_type": AUX_LOSS_TYPES,
                "router_aux_loss_scope": SCOPES,
            },
        )
        if self.router_aux_loss_scope == "global" and self.router_aux_loss_type == "mole":
            problems.append(
                "router_aux_loss_scope='global' has no meaning with router_aux_loss_type='mole', which balances each sample "
                "by itself. Use 'switch' or 'pooled', or leave router_aux_loss_scope out."
            )
        return problems

    def _count_problems(self) -> list[str]:
        counts = self.num_new_experts
        if not isinstance(counts, dict):
            return count_problems(self, "num_new_experts")
        if not counts:
            return [
                "num_new_experts is an empty dictionary, so no layer would get an expert. Name at least one layer."
            ]
        problems = [
            f"num_new_experts[{layer!r}] must be a whole number of at least 1, but is {count!r}. Leave out layers that "
            "get none."
            for layer, count in counts.items()
            if not is_positive_int(count)
        ]
        if self.layers is not None:
            problems.append("layers has no effect beside a dictionary in num_new_experts, whose keys are the layers.")
        if (
            not problems
            and len(set(counts.values())) > 1
            and self.router_aux_loss_coef
            and self.router_aux_loss_type != "switch"
        ):
            problems.append(
                f"router_aux_loss_type={self.router_aux_loss_type!r} pools all routers and needs the same number of "
                "experts everywhere. Use 'switch' where num_new_experts differs by layer."
            )
        return problems

    def _layer_problems(self) -> list[str]:
        problems = []
        for name in ("layers", "num_new_experts", "copy_sources"):
            layers = getattr(self, name)
            if name == "layers" and layers is not None and not isinstance(layers, list | tuple | set):
                problems.append(f"layers must be a list of layer numbers, but is {layers!r}.")
            elif name == "layers" and layers is not None and not layers:
                problems.append("layers is empty, so no layer would get an expert. Leave it out for all layers.")
            elif isinstance(layers, dict | list | tuple | set):
                problems += [
                    f"{name} must name layers by their number, counted from 0, but has {layer!r}."
                    for layer in layers
                    if not (isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0)
                ]
        return problems

    def _source_problems(self) -> list[str]:
        if self.copy_sources is None:
            return []
        if not isinstance(self.copy_sources, dict):
            return [f"copy_sources must be a dictionary {{layer: expert}}, but is {self.copy_sources!r}."]
        problems = []
        for layer, source in self.copy_sources.items():
            experts = source if isinstance(source, list | tuple) else [source]
            if not all(isinstance(e, int) and not isinstance(e, bool) and e >= 0 for e in experts):
                problems.append(f"copy_sources[{layer!r}] must be the number of an expert, but is {source!r}.")
            elif isinstance(source, list | tuple) and len(source) != self.num_new_experts_in(layer):
                problems.append(
                    f"copy_sources[{layer!r}] names {len(source)} experts, but the layer gets "
                    f"{self.num_new_experts_in(layer)} new ones. Name one source for each, or a single one for all."
                )
        return problems


def _with_int_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in value.items()}
