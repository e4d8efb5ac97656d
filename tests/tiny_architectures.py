"""One tiny model per architecture, with where its MLPs are: the oracle for finding targets by structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn


VOCABULARY = 40
PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = "gate_proj up_proj down_proj"
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens() -> dict[str, torch.Tensor]:
    """Input of a text model; no special token inside."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, VOCABULARY, (2, 6), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def tokens_without_state() -> dict[str, Any]:
    """Input of a recurrent text model, which writes its state in place."""
    return {"input_ids": tokens()["input_ids"], "use_cache": False}


def sequence_pair() -> dict[str, torch.Tensor]:
    """Input of an encoder-decoder; both sides differ in length."""
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :4]}


def pixels(size: int = 16) -> dict[str, torch.Tensor]:
    """Two images."""
    return {"pixel_values": torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def speech() -> dict[str, torch.Tensor]:
    """Log-mel features of a second of speech, and the text so far."""
    features = torch.rand(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tokens()["input_ids"][:, :4]}


def image_and_text(num_image_tokens: int = 4) -> dict[str, torch.Tensor]:
    """Text that begins with the place holders of an image."""
    batch = tokens()
    image = torch.full((2, num_image_tokens), 3)
    input_ids = torch.cat([image, batch["input_ids"]], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels()}


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        name (`str`): how the test is called.
        config (`Callable`): makes the configuration.
        model (`str`): class name in transformers.
        mlp (`str`): last name parts of the linears of each MLP.
        num_mlps (`int`): how many MLPs are to be found.
        inputs (`Callable`): makes the input.
        inside (`str`): all adapters have to be below a module of this name.
    """

    name: str
    config: Callable[[], transformers.PretrainedConfig]
    model: str
    mlp: str = GATED
    num_mlps: int = 2
    inputs: Callable[[], dict[str, Any]] = field(default=tokens)
    inside: str = ""

    def build(self) -> nn.Module:
        """The model, always with the same weights, in evaluation mode (no dropout)."""
        torch.manual_seed(0)
        return getattr(transformers, self.model)(self.config()).eval()


def plain(config_name: str, **overrides: Any) -> Callable[[], transformers.PretrainedConfig]:
    """A configuration with the usual names for sizes."""
    return lambda: getattr(transformers, config_name)(**{**PLAIN, **overrides})


def own(config_name: str, **settings: Any) -> Callable[[], transformers.PretrainedConfig]:
    """A configuration with its own names for sizes."""
    return lambda: getattr(transformers, config_name)(**settings)


def llava_config() -> transformers.PretrainedConfig:
    """A CLIP tower of 2 layers whose MLPs carry the names that some language models use too."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**PLAIN),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def blip2_config() -> transformers.PretrainedConfig:
    """Vision tower, Q-Former and OPT; only OPT is the language model."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**small, image_size=16, patch_size=8).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(
            **small, encoder_hidden_size=16, vocab_size=VOCABULARY
        ).to_dict(),
        text_config=opt_config().to_dict(),
        num_query_tokens=4,
        image_token_index=3,
    )


def opt_config() -> transformers.PretrainedConfig:
    """OPT with all its names for widths."""
    return transformers.OPTConfig(**{**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16})


T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BERT = {**PLAIN, "type_vocab_size": 2}
BERT_MLP = "intermediate.dense output.dense"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": VOCABULARY,
    **SPECIAL,
    "decoder_start_token_id": 1,
}

ARCHITECTURES = [
    Architecture("llama", plain("LlamaConfig"), "LlamaForCausalLM"),
    Architecture("mistral", plain("MistralConfig", num_key_value_heads=1), "MistralForCausalLM"),
    Architecture("gemma", plain("GemmaConfig", head_dim=8, num_key_value_heads=1), "GemmaForCausalLM"),
    Architecture("gemma2", plain("Gemma2Config", head_dim=8, num_key_value_heads=1), "Gemma2ForCausalLM"),
    Architecture("gemma3_text", plain("Gemma3TextConfig", head_dim=8, num_key_value_heads=1), "Gemma3ForCausalLM"),
    Architecture("qwen2", plain("Qwen2Config", num_key_value_heads=1), "Qwen2ForCausalLM"),
    Architecture("qwen3", plain("Qwen3Config", num_key_value_heads=1, head_dim=8), "Qwen3ForCausalLM"),
    Architecture("phi", plain("PhiConfig"), "PhiForCausalLM", "fc1 fc2"),
    Architecture("phi3", plain("Phi3Config"), "Phi3ForCausalLM", "gate_up_proj down_proj"),
    Architecture("stablelm", plain("StableLmConfig", num_key_value_heads=2), "StableLmForCausalLM"),
    Architecture("gpt2-conv1d", own("GPT2Config", **GPT2), "GPT2LMHeadModel", "c_fc c_proj"),
    Architecture(
        "gpt_neo",
        own(
            "GPTNeoConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            max_position_embeddings=32,
            intermediate_size=24,
            attention_types=[[["global", "local"], 1]],
        ),
        "GPTNeoForCausalLM",
        "c_fc c_proj",
    ),
    Architecture("gptj", own("GPTJConfig", **GPT2, rotary_dim=4), "GPTJForCausalLM", "fc_in fc_out"),
    Architecture("gpt_neox", plain("GPTNeoXConfig"), "GPTNeoXForCausalLM", "dense_h_to_4h dense_4h_to_h"),
    Architecture("gpt_bigcode", own("GPTBigCodeConfig", **GPT2), "GPTBigCodeForCausalLM", "c_fc c_proj"),
    Architecture(
        "codegen", own("CodeGenConfig", **{**GPT2, "n_head": 4}, rotary_dim=4), "CodeGenForCausalLM", "fc_in fc_out"
    ),
    Architecture(
        "bloom",
        own("BloomConfig", vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
        "BloomForCausalLM",
        "dense_h_to_4h dense_4h_to_h",
    ),
    Architecture(
        "falcon",
        own("FalconConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        "FalconForCausalLM",
        "dense_h_to_4h dense_4h_to_h",
    ),
    Architecture("opt", opt_config, "OPTForCausalLM", "fc1 fc2"),
    Architecture(
        "mpt",
        own("MptConfig", vocab_size=VOCABULARY, d_model=16, n_heads=2, n_layers=2, max_seq_len=32, expansion_ratio=2),
        "MptForCausalLM",
        "up_proj down_proj",
    ),
    Architecture(
        "gemma4",
        plain(
            "Gemma4TextConfig",
            head_dim=8,
            global_head_dim=8,
            num_key_value_heads=1,
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=4,
        ),
        "Gemma4ForCausalLM",
    ),
    # a dense layer and the shared expert of a mixture
    Architecture(
        "llama4",
        plain(
            "Llama4TextConfig",
            head_dim=8,
            num_key_value_heads=1,
            num_local_experts=2,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=2,
        ),
        "Llama4ForCausalLM",
    ),
    # Mamba, attention and one MLP
    Architecture(
        "nemotron_h",
        plain(
            "NemotronHConfig",
            num_hidden_layers=3,
            hybrid_override_pattern="M*-",
            num_key_value_heads=1,
            head_dim=8,
            mamba_num_heads=2,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=4,
        ),
        "NemotronHForCausalLM",
        "up_proj down_proj",
        1,
    ),
    Architecture("olmo2", plain("Olmo2Config"), "Olmo2ForCausalLM"),
    Architecture("cohere", plain("CohereConfig"), "CohereForCausalLM"),
    Architecture("starcoder2", plain("Starcoder2Config"), "Starcoder2ForCausalLM", "c_fc c_proj"),
    Architecture("t5", own("T5Config", **T5), "T5ForConditionalGeneration", "wi wo", 4, sequence_pair),
    Architecture(
        "t5-gated",
        own("T5Config", **T5, feed_forward_proj="gated-gelu"),
        "T5ForConditionalGeneration",
        "wi_0 wi_1 wo",
        4,
        sequence_pair,
    ),
    Architecture("mt5", own("MT5Config", **T5), "MT5ForConditionalGeneration", "wi_0 wi_1 wo", 4, sequence_pair),
    Architecture("bart", own("BartConfig", **SEQ2SEQ), "BartForConditionalGeneration", "fc1 fc2", 4, sequence_pair),
    Architecture(
        "whisper",
        own("WhisperConfig", **SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=16),
        "WhisperForConditionalGeneration",
        "fc1 fc2",
        4,
        speech,
    ),
    Architecture("bert", own("BertConfig", **BERT), "BertForMaskedLM", BERT_MLP),
    Architecture("roberta", own("RobertaConfig", **BERT), "RobertaForMaskedLM", BERT_MLP),
    Architecture("xlm-roberta", own("XLMRobertaConfig", **BERT), "XLMRobertaForMaskedLM", BERT_MLP),
    Architecture("electra", own("ElectraConfig", **BERT, embedding_size=16), "ElectraForMaskedLM", BERT_MLP),
    # one layer that is called twice
    Architecture("albert", own("AlbertConfig", **BERT, embedding_size=16), "AlbertForMaskedLM", "ffn ffn_output", 1),
    Architecture("deberta", own("DebertaConfig", **BERT), "DebertaForMaskedLM", BERT_MLP),
    Architecture("deberta-v2", own("DebertaV2Config", **BERT), "DebertaV2ForMaskedLM", BERT_MLP),
    Architecture("layoutlm", own("LayoutLMConfig", **BERT), "LayoutLMForMaskedLM", BERT_MLP),
    Architecture(
        "distilbert",
        own("DistilBertConfig", vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
        "DistilBertForMaskedLM",
        "lin1 lin2",
    ),
    Architecture("modernbert", plain("ModernBertConfig"), "ModernBertForMaskedLM", "Wi Wo"),
    Architecture("vit", own("ViTConfig", **VISION), "ViTForImageClassification", "fc1 fc2", inputs=pixels),
    # the third MLP is that of the pooling head
    Architecture("siglip-vision", own("SiglipVisionConfig", **VISION), "SiglipVisionModel", "fc1 fc2", 3, pixels),
    Architecture("clip-vision", own("CLIPVisionConfig", **VISION), "CLIPVisionModel", "fc1 fc2", inputs=pixels),
    Architecture(
        "dinov2", own("Dinov2Config", **VISION, mlp_ratio=2), "Dinov2ForImageClassification", "fc1 fc2", inputs=pixels
    ),
    Architecture(
        "llava", llava_config, "LlavaForConditionalGeneration", inputs=image_and_text, inside="language_model"
    ),
    Architecture(
        "blip-2",
        blip2_config,
        "Blip2ForConditionalGeneration",
        "fc1 fc2",
        inputs=image_and_text,
        inside="language_model",
    ),
    Architecture(
        "rwkv",
        own(
            "RwkvConfig",
            vocab_size=VOCABULARY,
            context_length=32,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=24,
        ),
        "RwkvForCausalLM",
        "feed_forward.key feed_forward.receptance feed_forward.value",
        inputs=tokens_without_state,
    ),
]
