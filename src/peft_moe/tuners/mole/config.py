"""`MoLEConfig`: what a user chooses about a mixture of LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..config import Count, CountByName, Float32, NotNegative, Share, Targets
from ..lora_config import LoraExpertsConfig, as_set


ATTENTION = "attention"


@dataclass
class MoLEConfig(LoraExpertsConfig):
    """Configuration of a [`MoLEModel`]: every MLP gets a router and a few LoRA experts, each token uses its best ones.

    After LLaVA-MoLE (https://huggingface.co/papers/2401.16160). `docs/methods/mole.md` maps the symbols of the paper
    to these fields and lists every place where paper and released code differ.

    Args:
        num_experts (`int`):
            LoRA experts per MLP (E). Paper: 3. With 1 there is no router, MoLE is LoRA, and the fields about routing
            have no effect.
        top_k (`int`):
            Experts per token (K). Paper: 1. The default of 2, weighted by probability, was better on real data in
            every seed (`benchmarks/studies/log.md`).
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
            Linears that get one ordinary LoRA of the same rank. `"attention"` (default, as in the paper) finds those
            of the attention blocks; `None` turns it off.
        router_scope (`"mlp"` or `"module"`):
            One router per MLP, which reads the MLP's input and is shared by its linears (default, paper), or one per
            linear.
        gate_scale (`"none"`, `"straight_through"` or `"prob"`):
            What an expert's output is multiplied with: 1 (paper), 1 with a gradient to the router, or its probability
            (default, `benchmarks/studies/log.md`). With `"none"` routers learn from the router losses only, one of
            which must be on.
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
            Its form, see [`~peft_moe.aux_loss.load_balancing_loss`]. `"mole"` is that of the released code.
        router_aux_loss_scope (`"process"` or `"global"`):
            Whose tokens are balanced in a distributed run: those of each process by itself, or those of all processes
            in the same forward pass, by two small all-reduces. `"global"` lets a process specialise on the kind of
            data that it happens to get, and is not for `"mole"`, which balances each sample by itself.
        router_z_loss_coef (`float`):
            Weight of the router z-loss. 0 turns it off.
        num_experts_pattern (`dict[str, int]`):
            Other numbers of experts for MLPs whose name matches, e.g. `{"layers.0.mlp": 8}`. Keys are matched as in
            `rank_pattern`.
        rank_pattern (`dict[str, int]`), alpha_pattern (`dict[str, int]`):
            Other ranks and alphas for linears whose name matches.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Linears to leave alone.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Only these layers of the module list that `layers_pattern` names.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of that list.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save, e.g. a multi-modal projector.
        init_lora_weights (`bool` or `"gaussian"`):
            `True`: A Kaiming-uniform, B zero, so that training starts from the base model. `False` leaves B random too
            (for tests).
        kernel_backend (`str`):
            What computes the experts: `"auto"` or the name of a backend, see [`peft_moe.kernels.explain`].
        checkpoint_format (`int`):
            Format of the saved adapter; leave as it is.

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

    num_experts: Count = field(default=3, metadata={"help": "LoRA experts per MLP."})
    top_k: Count = field(default=2, metadata={"help": "Experts per token."})
    lora_target_modules: Targets | None = field(
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
    router_init_std: NotNegative | None = field(
        default=None, metadata={"help": "Width of the normal distribution of router weights. Default: as nn.Linear."}
    )
    router_jitter_noise: Share = field(default=0.0, metadata={"help": "Multiplicative noise on the router's input."})
    router_dtype: Float32 = field(default="float32", metadata={"help": "Routers compute in float32."})
    router_aux_loss_coef: NotNegative = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    router_aux_loss_type: Literal["switch", "pooled", "mole"] = field(
        default="switch", metadata={"help": "Form of the load-balancing loss."}
    )
    router_aux_loss_scope: Literal["process", "global"] = field(
        default="process", metadata={"help": "Balance the tokens of each process, or those of all processes."}
    )
    router_z_loss_coef: NotNegative = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    num_experts_pattern: CountByName = field(
        default_factory=dict, metadata={"help": "Other numbers of experts for MLPs whose name matches."}
    )

    method: ClassVar[str] = "MoLE"
    paper_url: ClassVar[str] = "https://huggingface.co/papers/2401.16160"
    card_fields: ClassVar[tuple[str, ...]] = (
        "num_experts",
        "top_k",
        "soft",
        "gate_scale",
        "router_scope",
        "r",
        "lora_alpha",
    )

    def __post_init__(self) -> None:
        self.lora_target_modules = as_set(self.lora_target_modules)
        super().__post_init__()
        self.router_dtype = "float32"

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if self.top_k > self.num_experts > 1 and not self.soft:
            problems.append(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is {self.num_experts}. "
                "Lower top_k, or add experts."
            )
        problems += [
            f"num_experts_pattern[{key!r}] is {value}, which is less than top_k={self.top_k}."
            for key, value in self.num_experts_pattern.items()
            if 1 < value < self.top_k and not self.soft
        ]
        has_routers = any(count != 1 for count in (self.num_experts, *self.num_experts_pattern.values()))
        has_router_loss = self.router_aux_loss_coef or self.router_z_loss_coef
        if self.gate_scale == "none" and has_routers and not (self.soft or has_router_loss or self.inference_mode):
            problems.append(
                "gate_scale='none' together with router_aux_loss_coef=0 and router_z_loss_coef=0 leaves routers "
                "without any gradient: they would stay as they are initialised. Use gate_scale='prob' or "
                "'straight_through', or give one of the two losses a coefficient."
            )
        if self.num_experts_pattern and self.router_aux_loss_type != "switch" and self.router_aux_loss_coef:
            problems.append(
                f"router_aux_loss_type={self.router_aux_loss_type!r} pools all routers and needs the same number of "
                "experts everywhere. Use 'switch' together with num_experts_pattern."
            )
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
