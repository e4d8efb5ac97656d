"""`MoeLlavaConfig`: a LLaVA configuration, and what is sparse about the model."""

import copy
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig


# trainers of others (trl) look for these on the configuration of the text model, and change them there
ON_TEXT_CONFIG = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
CHANGED_BY_TRAINERS = ("router_aux_loss_coef", "output_router_logits")


@strict
class MoeLlavaConfig(LlavaConfig):
    """Configuration of a [`MoeLlavaForConditionalGeneration`]: LLaVA with mixtures of experts in its language model.

    After MoE-LLaVA (https://huggingface.co/papers/2401.15947). The fields of [`~transformers.LlavaConfig`] keep their
    meaning; `text_config` stays that of a dense backbone (Llama, Mistral, Qwen, Phi, StableLM, Gemma, ...).

    Args:
        moe_layers (`str` or `list[int]`):
            Decoder layers whose MLP becomes a mixture: `"interval"` (0, 2, 4, ...; paper), `"all"`, `"first_half"`,
            `"second_half"`, or their indices.
        num_experts (`int` or `list[int]`):
            Experts per mixture (E), or one number for each mixture, first layer first. Paper: 4.
        num_experts_per_tok (`int`):
            Experts that a token visits (K). Paper: 2. Fixed once a model is built.
        norm_topk_prob (`bool`):
            Divide the probabilities of the chosen experts by their sum, so that copies of one MLP together equal that
            MLP (released code). With `num_experts_per_tok=1` the weight is then exactly 1 and carries the gradient of
            `log p` (straight-through). `False` weights by the probability itself (paper, eq. 6; for one expert per
            token also the released code), which changes the model on the day it is upcycled.
        use_residual (`bool`):
            Keep the dense MLP beside the experts and mix both with a learned softmax per token (DeepSpeed's residual
            MoE).
        router_drop (`"position"`, `"probability"` or `None`):
            Whether experts have a limited capacity, and which tokens an overfull expert drops: the last ones of the
            batch (released code) or the least probable ones (paper: batch priority routing). By default nothing is
            dropped. A dropped choice has weight 0, and what a token gets depends on the rest of the batch; nothing is
            saved by it, this is for parity with the original.
        router_capacity_factor (`float`), router_eval_capacity_factor (`float`):
            An expert accepts `ceil(K · factor · tokens / E)` choices, in training and in evaluation. Without effect
            unless `router_drop` is set. Released scripts: 1.5 and 2.0, where the latter drops nothing if K = 2, E = 4.
        router_min_capacity (`int`):
            It accepts at least this many.
        router_second_expert (`"top"` or `"gumbel"`):
            Where K = 2, take the second best expert, or in training sample it by adding Gumbel noise to the logits.
            The released code samples in evaluation too; here evaluation is always deterministic.
        router_jitter_noise (`float`):
            In training, multiply the router's input by a uniform draw from 1 ± this.
        router_aux_loss_coef (`float`):
            Weight of the load-balancing loss, which is part of the loss in training, and in evaluation where
            `output_router_logits` is set. 0 turns it off.
        router_aux_loss_type (`"switch"`, `"pooled"` or `"moe_llava"`):
            Its form, see `load_balancing_loss`. With `"moe_llava"` (released code) it is a sum over layers, so that
            the same coefficient weighs more than with the others.
        router_z_loss_coef (`float`):
            Weight of the router z-loss. 0 turns it off.
        output_router_logits (`bool`):
            Return the logits of every router. This field and `router_aux_loss_coef` are set on `text_config` too,
            where trl's trainers read and change them; the values there count.
        lm_head_bias (`bool`):
            Whether the language-model head has a bias (original checkpoints on Phi).

    Example:

    ```py
    >>> from transformers import CLIPVisionConfig, Qwen2Config
    >>> from peft_moe.models import MoeLlavaConfig

    >>> config = MoeLlavaConfig(vision_config=CLIPVisionConfig(), text_config=Qwen2Config(), num_experts=4)
    >>> config.moe_layer_indices[:3]
    [0, 2, 4]
    ```

    Raises:
        StrictDataclassFieldValidationError: a field has a value of another type, or none of its choices.
        ValueError: numbers out of their range, or fields that do not go together; all of them are named.
    """

    model_type = "moe_llava"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "z_loss", "router_logits"]

    moe_layers: Literal["interval", "all", "first_half", "second_half"] | list[int] | tuple[int, ...] = "interval"
    num_experts: int | list[int] | tuple[int, ...] = 4
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    use_residual: bool = False
    router_drop: Literal["position", "probability"] | None = None
    router_capacity_factor: float | int = 1.5
    router_eval_capacity_factor: float | int = 2.0
    router_min_capacity: int = 0
    router_second_expert: Literal["top", "gumbel"] = "top"
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_type: Literal["switch", "pooled", "moe_llava"] = "switch"
    router_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ON_TEXT_CONFIG:
            setattr(self.text_config, name, getattr(self, name))
        self.check_moe_fields()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "text_config" and hasattr(value, "to_dict"):
            # whoever gave it may use it elsewhere
            value = copy.deepcopy(value)
        super().__setattr__(name, value)
        text_config = self.__dict__.get("text_config")
        if name in ON_TEXT_CONFIG and hasattr(text_config, "to_dict"):
            setattr(text_config, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.LlavaConfig`], with what has been changed on `text_config`, whose values count."""
        fields = super().to_dict()
        changed = {name: getattr(self.text_config, name, None) for name in CHANGED_BY_TRAINERS}
        return {**fields, **{name: value for name, value in changed.items() if value is not None}}

    @property
    def _experts_implementation(self) -> str | None:
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None) -> None:
        # the inherited setter hands a plain value to the vision tower too, which has no experts and refuses it
        if not isinstance(value, dict):
            value = {"": value, "text_config": value}
        LlavaConfig._experts_implementation.fset(self, value)

    @property
    def moe_layer_indices(self) -> list[int]:
        """Indices of the decoder layers that are mixtures, in ascending order."""
        num_layers = self.text_config.num_hidden_layers
        if not isinstance(self.moe_layers, str):
            return sorted(self.moe_layers)
        placements = {
            "interval": range(0, num_layers, 2),
            "all": range(num_layers),
            "first_half": range(num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
        }
        return list(placements[self.moe_layers])

    @property
    def num_experts_by_layer(self) -> dict[int, int]:
        """Index of a decoder layer → number of its experts, for every mixture."""
        layers = self.moe_layer_indices
        counts = self.num_experts if isinstance(self.num_experts, list | tuple) else [self.num_experts] * len(layers)
        return dict(zip(layers, counts, strict=True))

    @classmethod
    def released_code(cls, **overrides: Any) -> "MoeLlavaConfig":
        """The routing of the released scripts: capacity 1.5 by position, summed loss, sampled second of two."""
        top_k = overrides.get("num_experts_per_tok", cls.num_experts_per_tok)
        settings = {
            "norm_topk_prob": top_k != 1,
            "router_drop": "position",
            "router_second_expert": "gumbel" if top_k == 2 else "top",
            "router_aux_loss_type": "moe_llava",
            "router_aux_loss_coef": 0.01,
        }
        return cls(**{**settings, **overrides})

    def check_moe_fields(self) -> None:
        """Raise one `ValueError` that names every number out of its range and all fields that do not go together."""
        problems = self._placement_problems() + self._count_problems() + self._range_problems()
        if problems:
            raise ValueError("MoeLlavaConfig cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))

    def _placement_problems(self) -> list[str]:
        layers, num_layers = self.moe_layer_indices, self.text_config.num_hidden_layers
        problems = []
        if not layers:
            problems.append(f"moe_layers={self.moe_layers!r} selects no layer. Name at least one.")
        if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
            problems.append(f"moe_layers names {outside}, but the text model has layers 0 to {num_layers - 1}.")
        if len(set(layers)) < len(layers):
            problems.append(f"moe_layers names a layer twice: {layers}.")
        return problems

    def _count_problems(self) -> list[str]:
        problems = []
        per_layer = not isinstance(self.num_experts, int)
        counts, layers = list(self.num_experts) if per_layer else [self.num_experts], self.moe_layer_indices
        top_k = self.num_experts_per_tok
        if top_k < 1:
            problems.append(f"num_experts_per_tok must be at least 1, but is {top_k}.")
        if not counts or min(counts) < 1:
            problems.append(f"num_experts must be at least 1, but is {self.num_experts}.")
        elif top_k > min(counts):
            problems.append(
                f"num_experts_per_tok is {top_k}, but a layer has only {min(counts)} experts. Lower "
                "num_experts_per_tok, or add experts."
            )
        if per_layer and len(counts) != len(layers):
            problems.append(
                f"num_experts lists {len(counts)} numbers, but {len(layers)} layers are mixtures ({layers}). Give one "
                "number for each of them, or one for all."
            )
        if self.router_second_expert == "gumbel" and top_k != 2:
            problems.append(
                "router_second_expert='gumbel' samples the second of two experts, but num_experts_per_tok is "
                f"{top_k}. Use 2, or router_second_expert='top'."
            )
        if self.router_aux_loss_type == "pooled" and len(set(counts)) > 1:
            problems.append(
                "router_aux_loss_type='pooled' needs the same number of experts in every layer, but num_experts is "
                f"{self.num_experts}. Use 'switch', which treats each router by itself."
            )
        return problems

    def _range_problems(self) -> list[str]:
        at_least_0 = ("0 or more", lambda value: 0 <= value < math.inf)
        above_0 = ("more than 0", lambda value: 0 < value < math.inf)
        ranges = {
            **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "router_min_capacity"), at_least_0),
            **dict.fromkeys(("router_capacity_factor", "router_eval_capacity_factor"), above_0),
            "router_jitter_noise": ("in [0, 1)", lambda value: 0 <= value < 1),
        }
        return [
            f"{name} must be {words}, but is {getattr(self, name)}."
            for name, (words, is_inside) in ranges.items()
            if not is_inside(getattr(self, name))
        ]


__all__ = ["MoeLlavaConfig"]
