"""Tiny mixtures of experts with random weights, one per family of transformers; every size is a multiple of 8."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn


NUM_EXPERTS = 4
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class MoeFamily:
    """One row.

    Args:
        name (`str`): the family, as transformers calls it.
        config (`str`), model (`str`): class names in transformers.
        settings (`dict`): what its configuration calls things.
        moe_layers (`tuple[int, ...]`): layers with experts.
        normalizes (`bool`): whether the weights of a token have the same sum whatever is chosen.
        is_further (`bool`): whether it is tested only where time does not matter.
        since (`str`): the version of transformers in which its router does all of the routing.
        noise (`float`): how far runs with equal numbers at other addresses are apart.
        is_linear (`bool`): whether its router does nothing with its input but to multiply it by one matrix.
    """

    name: str
    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    moe_layers: tuple[int, ...] = (0, 1, 2)
    normalizes: bool = True
    noise: float = 0.0
    is_linear: bool = True
    is_further: bool = False
    since: str = "5.10"

    def make_config(self, **overrides: Any) -> transformers.PretrainedConfig:
        """The configuration."""
        return getattr(transformers, self.config)(**{**COMMON, **self.settings, **overrides})

    def build(self, **overrides: Any) -> nn.Module:
        """The model, always with the same weights, in evaluation mode and frozen. Routers are far from ties."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(self.make_config(**overrides)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith((".gate.weight", ".router.weight", ".router.proj.weight")):
                nn.init.normal_(parameter, std=0.3)
        return model.requires_grad_(False)


def family(name: str, stem: str, settings: dict[str, Any], *, config: str = "", **fields: Any) -> MoeFamily:
    """A row, by what its class names begin with."""
    return MoeFamily(name, config or f"{stem}Config", f"{stem}ForCausalLM", settings, **fields)


def further(name: str, stem: str, settings: dict[str, Any], **fields: Any) -> MoeFamily:
    """A row for a family that shares its layout with another one."""
    return family(name, stem, settings, is_further=True, **{"since": "5.23", **fields})


FAMILIES = [
    family("mixtral", "Mixtral", {"num_local_experts": NUM_EXPERTS}),
    family(
        "qwen2_moe",
        "Qwen2Moe",
        {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        normalizes=False,
    ),
    family(
        "qwen3_moe",
        "Qwen3Moe",
        {"num_experts": NUM_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]},
        moe_layers=(0, 2),
    ),
    family("olmoe", "Olmoe", {"num_experts": NUM_EXPERTS}, normalizes=False),
    family("granitemoe", "GraniteMoe", {"num_local_experts": NUM_EXPERTS}, since="5.23"),
    family("gpt_oss", "GptOss", {"num_local_experts": NUM_EXPERTS}),
    family("phimoe", "Phimoe", {"num_local_experts": NUM_EXPERTS}, normalizes=False),
    family(
        "deepseek_v2",
        "DeepseekV2",
        {**DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 1.5},
        normalizes=False,
        since="5.17",
    ),
    family("deepseek_v3", "DeepseekV3", DEEPSEEK, since="5.17"),
    family(
        "glm4_moe",
        "Glm4Moe",
        {
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        moe_layers=(1, 2),
        since="5.17",
    ),
    family("minimax", "MiniMax", {"num_local_experts": NUM_EXPERTS, "block_size": 8}),
    family("flex_olmo", "FlexOlmo", {"num_experts": NUM_EXPERTS}, normalizes=False),
    family(
        "aria_text",
        "AriaText",
        {"moe_num_experts": NUM_EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
        since="5.23",
    ),
    family(
        "nemotron_h",
        "NemotronH",
        {
            "layers_block_type": ["moe", "attention", "moe"],
            "n_routed_experts": NUM_EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "use_mamba_kernels": False,
        },
        moe_layers=(0, 2),
        since="5.17",
    ),
    family(
        "jamba",
        "Jamba",
        {
            "num_experts": NUM_EXPERTS,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        moe_layers=(0, 2),
        normalizes=False,
        noise=1e-5,  # its state space layers; the bare model does so too
        since="5.23",
    ),
]


ATTENTION = {"layer_types": ["full_attention"] * 3}
GROUPS = {"n_group": 1, "topk_group": 1}
FURTHER = [
    further(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        {"moe_num_experts": NUM_EXPERTS, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_interval": 1},
    ),
    further("minimax_m2", "MiniMaxM2", {"num_local_experts": NUM_EXPERTS, "rotary_dim": 8}),
    further("hunyuan_v1_moe", "HunYuanMoEV1", {"num_experts": NUM_EXPERTS, "moe_topk": 2}),
    further(
        "afmoe", "Afmoe", {"num_experts": NUM_EXPERTS, "num_shared_experts": 1, "num_dense_layers": 0, **ATTENTION}
    ),
    further(
        "dots1",
        "Dots1",
        {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 0, **GROUPS, **ATTENTION},
    ),
    further("lfm2_moe", "Lfm2Moe", {"num_experts": NUM_EXPERTS, "num_dense_layers": 0, **ATTENTION}),
    further(
        "qwen3_next", "Qwen3Next", {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 16, **ATTENTION}
    ),
    further(
        "qwen3_5_moe",
        "Qwen3_5Moe",
        config="Qwen3_5MoeTextConfig",
        settings={"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 16, **ATTENTION},
    ),
    further("solar_open", "SolarOpen", {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, **GROUPS}),
    further(
        "exaone_moe",
        "ExaoneMoe",
        {
            "num_experts": NUM_EXPERTS,
            "num_shared_experts": 1,
            **GROUPS,
            **ATTENTION,
            "mlp_layer_types": ["sparse"] * 3,
        },
    ),
    further("glm4_moe_lite", "Glm4MoeLite", {**DEEPSEEK, "mlp_layer_types": ["sparse"] * 3}),
    further(
        "hy_v3",
        "HYV3",
        {"num_experts": NUM_EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 0},
        moe_layers=(1, 2),
    ),
    further(
        "gemma4",
        "Gemma4",
        config="Gemma4TextConfig",
        settings={
            "num_experts": NUM_EXPERTS,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            **ATTENTION,
        },
        is_linear=False,
        noise=1e-6,  # where the file of an adapter happens to be mapped
    ),
]


def is_here(family: MoeFamily) -> bool:
    """Whether the installed transformers has the family in a form that can be extended."""
    return hasattr(transformers, family.config) and Version(transformers.__version__) >= Version(family.since)


FAMILIES = [family for family in [*FAMILIES, *FURTHER] if is_here(family)]


class _Families(dict[str, MoeFamily]):
    """A test that asks for a family which is not here is skipped."""

    def __missing__(self, name: str) -> MoeFamily:
        pytest.skip(
            f"transformers {transformers.__version__} has no {name} that can be extended", allow_module_level=True
        )


BY_NAME = _Families((family.name, family) for family in FAMILIES)


def moe_batch(batch_size: int = 2, num_tokens: int = 8, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens with labels, no padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 64, (batch_size, num_tokens), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}


def tiny_moe_llava() -> nn.Module:
    """Our own LLaVA with four experts in layers 0 and 2 of its language model."""
    from peft_moe import MoeLlavaForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**{**small, "num_hidden_layers": 1}, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**small, vocab_size=64, pad_token_id=0, initializer_range=0.2)
    torch.manual_seed(0)
    dense = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=3, image_seq_length=4, vision_feature_layer=-1
        )
    )
    sparse = MoeLlavaForConditionalGeneration.from_dense(dense, num_experts=NUM_EXPERTS, expert_noise=1.0)
    return sparse.eval().requires_grad_(False)


def image_batch() -> dict[str, torch.Tensor]:
    """An image and text in each sample, with labels."""
    batch = moe_batch()
    input_ids = torch.cat([torch.full((2, 4), 3), batch["input_ids"].clamp(min=4)], dim=1)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = input_ids.masked_fill(input_ids == 3, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "labels": labels,
    }
