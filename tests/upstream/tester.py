"""One model tester for LLaVA and MoeLlava: tiny configurations and inputs, as transformers' shared tests ask for."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from peft_moe.models import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel


class LlavaTester:
    """The control. Two decoder layers, two vision layers, 2 x 2 patches, batches of 3."""

    config_class: type[LlavaConfig] = LlavaConfig
    base_model_class: type = LlavaModel
    conditional_generation_class: type = LlavaForConditionalGeneration
    text_config_class = transformers.LlamaConfig
    vision_config_class = transformers.CLIPVisionConfig
    fields: dict[str, Any] = {}

    batch_size = 3
    num_image_tokens = 4
    seq_length = encoder_seq_length = 7 + num_image_tokens
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    pad_token_id = 0
    image_token_id = 3
    image_size = 8
    patch_size = 4

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> LlavaConfig:
        """A new configuration. Every width is a multiple of 8, which grouped matrix products need."""
        text_config = self.text_config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
        )
        vision_config = self.vision_config_class(
            hidden_size=32,
            intermediate_size=40,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )
        return self.config_class(
            text_config=text_config,
            vision_config=vision_config,
            image_token_index=self.image_token_id,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LlavaConfig, dict[str, torch.Tensor]]:
        """A new configuration, and samples that begin with an image."""
        text = torch.randint(4, self.vocab_size, (self.batch_size, self.seq_length - self.num_image_tokens))
        image = torch.full((self.batch_size, self.num_image_tokens), self.image_token_id)
        input_ids = torch.cat([image, text], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size),
        }
        return self.get_config(), inputs


class MoeLlavaTester(LlavaTester):
    """The same with a mixture in every decoder layer."""

    config_class = MoeLlavaConfig
    base_model_class = MoeLlavaModel
    conditional_generation_class = MoeLlavaForConditionalGeneration
    fields = {"moe_layers": "all", "num_experts": 4, "num_experts_per_tok": 2}


TESTERS = {"llava": LlavaTester, "moe_llava": MoeLlavaTester}
