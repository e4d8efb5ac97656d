"""`MoLEConfig`: what a user chooses about a mixture of LoRA experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ...kernels import validate_name
from ...losses import AUX_LOSS_TYPES
from ...routing.top_k import GATE_SCALES
from ..base import MoeTunerConfig, check_checkpoint_format, raise_config_problems
from ..registration import peft_type


ATTENTION = "attention"


@dataclass
class MoLEConfig(MoeTunerConfig):
    """Configuration of a [`MoLEModel`]: every MLP gets a router and a few LoRA experts, each token uses its best ones.

    After LLaVA-MoLE (https://huggingface.co/papers/2401.16160). `docs/methods/mole.md` maps the symbols of the paper to
    these fields and lists every place where paper and released code differ.

    Args:
        num_experts (`int`):
            LoRA experts per MLP (E). Paper: 3. With 1 there is no router, MoLE is LoRA, and the fields about routing
            have no effect.
        top_k (`int`):
            Experts per token (K). Paper: 1. The default of 2, weighted by probability, was better on real data in every
            seed (`docs/log.md`).
        r (`int`):
            Rank of each expert. Released code: 32.
        lora_alpha (`int`):
            Each expert is scaled by `lora_alpha / r`. Released code: 2 r.
        lora_dropout (`float`):
            Dropout on the input of the experts, not of the router. Released code: 0.05.
        use_rslora (`bool`):
            Scale by `lora_alpha / sqrt(r)` instead.
        target_modules (`Union[list[str], str]`, *optional*):
            Linears that get experts: names, name endings, a regular expression, or `"all-linear"`. By default the
            linears of every MLP of the (text) model, found by their structure.
        lora_target_modules (`Union[list[str], str]`, *optional*):
            Linears that get one ordinary LoRA of the same rank. `"attention"` (default, as in the paper) finds those of
            the attention blocks; `None` turns it off.
        router_scope (`"mlp"` or `"module"`):
            One router per MLP, which reads the MLP's input and is shared by its linears (default, paper), or one per
            linear.
        gate_scale (`"none"`, `"straight_through"` or `"prob"`):
            What an expert's output is multiplied with: 1 (paper), 1 with a gradient to the router, or its probability
            (default, `docs/log.md`).
        soft (`bool`):
            Use all experts, weighted by probability (the released inference). `top_k` and `gate_scale` are ignored.
        normalize_top_k (`bool`):
            With `top_k > 1`, divide the probabilities by their sum over the chosen experts.
        router_bias (`bool`):
            Whether routers have a bias. Released code: yes.
        router_init_std (`float`, *optional*):
            Draw router weights from a normal distribution of this width, biases 0. By default as `nn.Linear` (released
            code).
        router_jitter_noise (`float`):
            In training, multiply the router's input by a uniform draw from 1 ± this.
        router_dtype (`"float32"`):
            Routers compute in float32; nothing else is accepted.
        router_aux_loss_coef (`float`):
            Weight of the load-balancing loss. 0 turns it off. Where `top_k` equals the number of experts it has no
            effect: every expert is always used. With `soft` it counts the best expert of each token.
        router_aux_loss_type (`"switch"`, `"pooled"` or `"mole"`):
            Its form, see [`~peft_moe.losses.load_balancing_loss`]. `"mole"` is that of the released code.
        router_z_loss_coef (`float`):
            Weight of the router z-loss. 0 turns it off.
        num_experts_pattern (`dict[str, int]`):
            Other numbers of experts for MLPs whose name matches, e.g. `{"layers.0.mlp": 8}`. Keys are matched as in
            `rank_pattern`.
        rank_pattern (`dict[str, int]`), alpha_pattern (`dict[str, int]`):
            Other ranks and alphas for linears whose name matches.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Linears to leave alone.
        layers_to_transform (`Union[list[int], int]`, *optional*), layers_pattern (`Union[list[str], str]`, *optional*):
            Only these layers of the module list that `layers_pattern` names.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save, e.g. a multi-modal projector.
        init_lora_weights (`bool` or `"gaussian"`):
            `True`: A Kaiming-uniform, B zero, so that training starts from the base model. `False` leaves B random too
            (for tests).
        kernel_backend (`str`):
            What computes the experts: `"auto"` or the name of a backend, see [`peft_moe.kernels.explain`].

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from peft_moe import MoLEConfig

    >>> model = get_peft_model(model, MoLEConfig(num_experts=4, r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    >>> model.print_trainable_parameters()
    ```

    Raises:
        ValueError: one or more fields do not make sense; all of them are named.
    """

    num_experts: int = field(default=3, metadata={"help": "LoRA experts per MLP."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Experts are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the experts."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears that get experts. Default: those of every MLP."}
    )
    lora_target_modules: list[str] | str | None = field(
        default=ATTENTION, metadata={"help": "Linears that get one ordinary LoRA. Default: those of the attention."}
    )
    router_scope: Literal["mlp", "module"] = field(
        default="mlp", metadata={"help": "One router per MLP or one per linear."}
    )
    gate_scale: Literal["none", "straight_through", "prob"] = field(
        default="prob", metadata={"help": "What the output of an expert is multiplied with."}
    )
    soft: bool = field(default=False, metadata={"help": "Use all experts, weighted by probability."})
    normalize_top_k: bool = field(default=True, metadata={"help": "Make the weights of the chosen experts sum to 1."})
    router_bias: bool = field(default=True, metadata={"help": "Whether routers have a bias."})
    router_init_std: float | None = field(
        default=None, metadata={"help": "Width of the normal distribution of router weights. Default: as nn.Linear."}
    )
    router_jitter_noise: float = field(default=0.0, metadata={"help": "Multiplicative noise on the router's input."})
    router_dtype: str = field(default="float32", metadata={"help": "Routers compute in float32."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    router_aux_loss_type: Literal["switch", "pooled", "mole"] = field(
        default="switch", metadata={"help": "Form of the load-balancing loss."}
    )
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    num_experts_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other numbers of experts for MLPs whose name matches."}
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MOLE")
        check_checkpoint_format(self.checkpoint_format, method="MoLE")
        for name in ("num_experts_pattern", "rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name in ("target_modules", "exclude_modules", "lora_target_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        raise_config_problems("MoLEConfig", self._problems())
        self.router_dtype = "float32"

    def _problems(self) -> list[str]:
        """Everything that is wrong, in words that say what to do."""
        problems = [
            f"{name} must be a whole number of at least 1, but is {value!r}."
            for name, value in {"num_experts": self.num_experts, "top_k": self.top_k, "r": self.r}.items()
            if not _is_positive_int(value)
        ]
        if not problems and not self.soft and self.top_k > self.num_experts > 1:
            problems.append(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is "
                f"{self.num_experts}. Lower top_k, or add experts."
            )
        problems += self._type_problems()
        for name in ("num_experts_pattern", "rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            for key, value in (pattern if isinstance(pattern, dict) else {}).items():
                problems += _pattern_problems(name, key, value)
                if not _is_positive_int(self.top_k):
                    continue
                if (
                    name == "num_experts_pattern"
                    and _is_positive_int(value)
                    and 1 < value < self.top_k
                    and not self.soft
                ):
                    problems.append(f"num_experts_pattern[{key!r}] is {value}, which is less than top_k={self.top_k}.")
        problems += [
            f"{name} must be in [0, 1), but is {getattr(self, name)!r}."
            for name in ("lora_dropout", "router_jitter_noise")
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be a number and not negative, but is {getattr(self, name)!r}."
            for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_init_std")
            if not (name == "router_init_std" and self.router_init_std is None)
            and not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < math.inf)
        ]
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha must be a positive number, but is {self.lora_alpha!r}.")
        choices = {
            "gate_scale": GATE_SCALES,
            "router_scope": ("mlp", "module"),
            "router_aux_loss_type": AUX_LOSS_TYPES,
            "init_lora_weights": (True, False, "gaussian"),
        }
        problems += [
            f"{name} must be one of {', '.join(map(repr, allowed))}, but is {getattr(self, name)!r}."
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        if str(self.router_dtype).removeprefix("torch.") != "float32":
            problems.append(
                f"router_dtype must be 'float32', but is {self.router_dtype!r}: a router in lower precision ties and "
                "flips experts. Leave the field out; the experts themselves follow the dtype of the model."
            )
        if self.num_experts_pattern and self.router_aux_loss_type != "switch" and self.router_aux_loss_coef:
            problems.append(
                f"router_aux_loss_type={self.router_aux_loss_type!r} pools all routers and needs the same number of "
                "experts everywhere. Use 'switch' together with num_experts_pattern."
            )
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
            for name in ("use_rslora", "soft", "normalize_top_k", "router_bias")
            if not isinstance(getattr(self, name), bool)
        ]
        problems += [
            f"{name} must be a dictionary from names to numbers, but is {getattr(self, name)!r}."
            for name in ("num_experts_pattern", "rank_pattern", "alpha_pattern")
            if getattr(self, name) is not None and not isinstance(getattr(self, name), dict)
        ]
        for name in ("target_modules", "lora_target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            if not isinstance(value, list | set | tuple) or not all(isinstance(entry, str) for entry in value):
                problems.append(f"{name} must be a list of names, but is {value!r}.")
        return problems

    @classmethod
    def paper(cls, **overrides: Any) -> MoLEConfig:
        """The published setting: 3 experts of rank 32, top-1, unscaled, attention LoRA.

        The balance coefficient is not in the text that is publicly available; 0.01 is what re-implementations use.
        """
        settings: dict[str, Any] = {
            "num_experts": 3,
            "top_k": 1,
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "gate_scale": "none",
            "router_aux_loss_type": "mole",
            "router_aux_loss_coef": 0.01,
        }
        return cls(**{**settings, **overrides})

    @classmethod
    def released_code(cls, **overrides: Any) -> MoLEConfig:
        """What the released inference configuration runs: as [`paper`], but a dense mixture of all experts."""
        return cls.paper(**{"soft": True, **overrides})


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pattern_problems(name: str, key: Any, value: Any) -> list[str]:
    problems = []
    if name == "alpha_pattern":
        if not _is_number(value) or not value > 0:
            problems.append(f"{name}[{key!r}] must be a positive number, but is {value!r}.")
    elif not _is_positive_int(value):
        problems.append(f"{name}[{key!r}] must be at least 1, but is {value!r}.")
    try:
        re.compile(key)
    except (re.error, TypeError) as error:
        problems.append(f"{name} has the key {key!r}, which is no regular expression: {error}.")
    return problems
