"""`MoeLlavaForConditionalGeneration`: LLaVA with mixtures of experts in its language model."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel, PreTrainedModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_moe_llava import MoeLlavaConfig
from .routing import MoeLlavaTopKRouter, load_balancing_loss, router_z_loss
from .text_backbone import SparseModelMixin, build_text_model, decoder_layers
from .upcycling import model_type_of, upcycle


@dataclass
class MoeLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """Output of [`MoeLlavaModel`]: that of [`~transformers.LlavaModel`] and what the routers said.

    Args:
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One float32 tensor of shape `(batch_size * sequence_length, num_experts)` per mixture.
    """

    # newer versions of transformers make it a property of LLaVA's output, which could not be set
    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Output of [`MoeLlavaForConditionalGeneration`]: that of LLaVA and what the routers said.

    Args:
        aux_loss (`torch.Tensor`, *optional*):
            The load-balancing loss, not yet multiplied by its coefficient; `loss` contains it already.
        z_loss (`torch.Tensor`, *optional*, returned with `router_z_loss_coef > 0`):
            The router z-loss, likewise.
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One float32 tensor of shape `(batch_size * sequence_length, num_experts)` per mixture.
    """

    image_hidden_states: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class MoeLlavaPreTrainedModel(SparseModelMixin, LlavaPreTrainedModel):
    """What the classes below share."""

    config: MoeLlavaConfig
    config_class = MoeLlavaConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a MoeLlava, see [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: the checkpoint is a dense LLaVA, which [`MoeLlavaForConditionalGeneration.from_dense`] takes.
        """
        if pretrained_model_name_or_path is not None:
            _refuse_dense_checkpoint(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Choose what computes the experts, see [`~transformers.PreTrainedModel.set_experts_implementation`]."""
        if isinstance(experts_implementation, str):
            # older versions of transformers hand a plain name to the vision tower too, which has no experts
            experts_implementation = {"": experts_implementation, "text_config": experts_implementation}
        super().set_experts_implementation(experts_implementation)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, see [`~transformers.PreTrainedModel.save_pretrained`], with the code that loads it.

        Whoever has not installed this package loads the folder with `trust_remote_code=True`.
        """
        self.base_model.check_num_experts_per_tok()
        # transformers adds the entry of this class only
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **_auto_map()}
        super().save_pretrained(save_directory, *args, **kwargs)


class MoeLlavaModel(MoeLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and a language model some of whose MLPs are mixtures of experts."""

    def __init__(self, config: MoeLlavaConfig) -> None:
        # not LlavaModel's own: it would build a dense language model first
        super(LlavaModel, self).__init__(config)
        config.check_moe_fields()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = build_text_model(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MoeLlavaModelOutputWithPast:
        """As [`~transformers.LlavaModel`], with the routers' logits on request.

        The key-value cache goes through `kwargs`, under the name that the installed transformers gives it.

        Args:
            output_router_logits (`bool`, *optional*):
                Return the logits of every router; by default as the configuration says.

        Raises:
            ValueError: image tokens and image features differ in number, or `config.num_experts_per_tok` has changed.
            RuntimeError: reentrant gradient checkpointing, under which the auxiliary losses would have no gradient.
        """
        self.check_num_experts_per_tok()
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(image_outputs.pooler_output, dim=0)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            is_image = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
            inputs_embeds = inputs_embeds.masked_scatter(is_image, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_router_logits=_flag(output_router_logits, self.config),
            **kwargs,
        )
        router_logits = getattr(outputs, "router_logits", None)
        if router_logits and self.training and (_aux_loss_coef(self.config) or self.config.router_z_loss_coef):
            self._check_router_gradient(router_logits, outputs.last_hidden_state)
        return MoeLlavaModelOutputWithPast(**outputs, image_hidden_states=image_features)

    def check_num_experts_per_tok(self) -> None:
        """Raise a `ValueError` if the configuration says another number of experts per token than the routers."""
        if self.config.num_experts_per_tok != self.num_experts_per_tok:
            raise ValueError(
                f"config.num_experts_per_tok was set to {self.config.num_experts_per_tok}, but the routers of this "
                f"model were built for {self.num_experts_per_tok}. Set it back, and load the model with the other "
                "number: from_pretrained(..., num_experts_per_tok=...)."
            )

    def _check_router_gradient(self, router_logits: Sequence[torch.Tensor], hidden_states: torch.Tensor) -> None:
        if not hidden_states.requires_grad or all(logits.requires_grad for logits in router_logits):
            return
        layers = decoder_layers(self.language_model)
        for index, logits in zip(self.config.moe_layer_indices, router_logits, strict=True):
            if not logits.requires_grad and _trains_router(layers[index]):
                raise RuntimeError(
                    f"The auxiliary losses of the router of layer {index} have no gradient under reentrant gradient "
                    'checkpointing. Use gradient_checkpointing_kwargs={"use_reentrant": False}, or set '
                    "router_aux_loss_coef and router_z_loss_coef to 0."
                )


class MoeLlavaForConditionalGeneration(MoeLlavaPreTrainedModel, LlavaForConditionalGeneration):
    """A sparse LLaVA: answers in text about images and text.

    After MoE-LLaVA (https://huggingface.co/papers/2401.15947). [`from_dense`] makes one out of a trained LLaVA.

    Example:

    ```py
    >>> from peft_moe.models import MoeLlavaForConditionalGeneration

    >>> model = MoeLlavaForConditionalGeneration.from_dense("llava-hf/llava-1.5-7b-hf", num_experts=4)
    >>> model.save_pretrained("moe-llava-1.5-7b")
    >>> model = MoeLlavaForConditionalGeneration.from_pretrained("moe-llava-1.5-7b", device_map="auto")
    ```
    """

    balances_in_training = True
    """The losses of the routers are in `loss` in training, unless a call says `output_router_logits=False`."""

    def __init__(self, config: MoeLlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MoeLlavaModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        dense: LlavaForConditionalGeneration | str | Sequence[LlavaForConditionalGeneration | str],
        *,
        num_experts: int | list[int] = 4,
        num_experts_per_tok: int = 2,
        expert_noise: float = 0.0,
        **kwargs: Any,
    ) -> "MoeLlavaForConditionalGeneration":
        """Make a sparse model out of a dense one: every expert starts as a copy of the MLP that it replaces.

        With the default `norm_topk_prob` the new model computes what the dense one did, for any router, until training
        tells the experts apart (MoE-LLaVA, section 3.3; sparse upcycling, https://huggingface.co/papers/2212.05055).

        Args:
            dense ([`~transformers.LlavaForConditionalGeneration`], a path or name of one, or a list of those):
                The dense model; it is left as it is. Expert `e` is copied from the model `e mod n` of a list of `n`,
                all else from the first.
            num_experts (`int` or `list[int]`), num_experts_per_tok (`int`):
                See [`MoeLlavaConfig`].
            expert_noise (`float`):
                Add normal noise to every copied weight matrix, this times its own standard deviation wide, so that
                experts differ from the start.
            kwargs:
                Other fields of [`MoeLlavaConfig`] that say what is sparse, e.g. `moe_layers="all"`, and
                `experts_implementation`. All else is passed to the `from_pretrained` of the dense model, e.g. `dtype`.

        Raises:
            TypeError: `dense` is no LLaVA, or has adapters.
            ValueError: the fields do not fit the model, or its MLPs cannot become experts.

        Example:

        ```py
        >>> model = MoeLlavaForConditionalGeneration.from_dense(llava, num_experts=4, moe_layers="second_half")
        ```
        """
        fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
        return upcycle(cls, dense, fields=fields, expert_noise=expert_noise, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MoeLlavaCausalLMOutputWithPast:
        """As [`~transformers.LlavaForConditionalGeneration`], with the losses of the routers.

        Args:
            attention_mask (`torch.Tensor`, *optional*):
                As in LLaVA. If it has the shape `(batch_size, sequence_length)`, padding counts in no loss of the
                routers.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                -100 where the next token is not to be learned. In training, `loss` contains the auxiliary losses of
                the routers; in evaluation it does so only with `output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                Where to compute logits: at the last so many positions (0: at all), or at those of an index of shape
                `(num_positions,)` or `(batch_size, num_positions)`, or of a boolean mask `(batch_size,
                sequence_length)`, whose logits are flattened to `(num_true, vocab_size)`.
            output_router_logits (`bool`, *optional*):
                Return `router_logits` and `aux_loss`; by default as the configuration says. `False` in this call
                leaves the losses of the routers out of `loss`, in training too.

        Raises:
            RuntimeError: reentrant gradient checkpointing, under which the auxiliary losses would have no gradient.
        """
        config = self.config
        aux_loss_coef = _aux_loss_coef(config)
        is_refused = output_router_logits is False
        is_wanted = self.training and not is_refused and bool(aux_loss_coef or config.router_z_loss_coef)
        output_router_logits = _flag(output_router_logits, config)
        is_trained = is_wanted and labels is not None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits or is_trained,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if is_wanted and not is_trained and not output_router_logits and hidden_states.requires_grad:
            if not torch.compiler.is_compiling() and _trains_router(self):
                _warn_of_missing_labels()
        logits = self.lm_head(_at(hidden_states, logits_to_keep))

        loss = aux_loss = z_loss = None
        if labels is not None:
            vocab_size = config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        if outputs.router_logits and not is_refused:
            token_mask = _token_mask_of(attention_mask, hidden_states.shape[1])
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                top_k=config.num_experts_per_tok,
                loss_type=config.router_aux_loss_type,
                token_mask=token_mask,
            )
            weighted = aux_loss_coef * aux_loss
            if config.router_z_loss_coef:
                z_loss = router_z_loss(outputs.router_logits, token_mask=token_mask)
                weighted = weighted + config.router_z_loss_coef * z_loss
            if loss is not None:
                share = _share_of_step(labels, kwargs.get("num_items_in_batch"))
                loss = loss + share.to(loss.device) * weighted.to(loss.device)
        # router logits that only the losses needed stay inside
        hidden = {"last_hidden_state", *(["router_logits"] if is_trained and not output_router_logits else [])}
        passed_on = {name: value for name, value in outputs.items() if name not in hidden}
        return MoeLlavaCausalLMOutputWithPast(loss=loss, logits=logits, aux_loss=aux_loss, z_loss=z_loss, **passed_on)


def _token_mask_of(attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
    """Which of the last `num_tokens` tokens are padding (0); `None` where the mask does not say so by token."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_tokens:] if attention_mask.shape[1] >= num_tokens else None


def _at(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last positions, or those that an index names: for all samples, or per sample by number or by a mask."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None), :]
    if logits_to_keep.dim() < 2:
        return hidden_states[:, logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)


def _flag(output_router_logits: bool | None, config: MoeLlavaConfig) -> bool:
    if output_router_logits is not None:
        return output_router_logits
    return bool(getattr(config.text_config, "output_router_logits", config.output_router_logits))


def _aux_loss_coef(config: MoeLlavaConfig) -> float:
    return getattr(config.text_config, "router_aux_loss_coef", config.router_aux_loss_coef)


def _trains_router(module: nn.Module) -> bool:
    return any(isinstance(part, MoeLlavaTopKRouter) and part.weight.requires_grad for part in module.modules())


@functools.cache
def _warn_of_missing_labels() -> None:
    warnings.warn(
        "MoeLlava is trained without labels among its arguments (label_smoothing_factor, compute_loss_func or a loop "
        "of its own), so that the auxiliary losses of the routers are in no loss. Pass labels; or set "
        "output_router_logits=True and add router_aux_loss_coef * outputs.aux_loss, and router_z_loss_coef * "
        "outputs.z_loss, to the loss; or set both coefficients to 0.",
        stacklevel=3,
    )


def _share_of_step(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """With gradient accumulation, Trainer wants this batch's part of a sum over the step instead of a mean."""
    num_items = (labels[..., 1:] != -100).sum()
    if num_items_in_batch is None:
        return torch.ones_like(num_items, dtype=torch.float32)
    return num_items / torch.as_tensor(num_items_in_batch, device=num_items.device)


def _refuse_dense_checkpoint(name_or_path: Any, kwargs: dict[str, Any]) -> None:
    if model_type_of(name_or_path, kwargs) == "llava":
        raise ValueError(
            f"{str(name_or_path)!r} is a dense LLaVA, which has no experts to load. To make experts of its MLPs, use "
            f"MoeLlavaForConditionalGeneration.from_dense({str(name_or_path)!r}, num_experts=4)."
        )


def _auto_map() -> dict[str, str]:
    modeling = __name__.rpartition(".")[2]
    full = f"{modeling}.{MoeLlavaForConditionalGeneration.__name__}"
    return {
        "AutoConfig": f"{MoeLlavaConfig.__module__.rpartition('.')[2]}.{MoeLlavaConfig.__name__}",
        "AutoModel": f"{modeling}.{MoeLlavaModel.__name__}",
        "AutoModelForImageTextToText": full,
        "AutoModelForMultimodalLM": full,
    }


MoeLlavaConfig.register_for_auto_class()
MoeLlavaModel.register_for_auto_class("AutoModel")
MoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MoeLlavaForConditionalGeneration", "MoeLlavaModel", "MoeLlavaPreTrainedModel"]
