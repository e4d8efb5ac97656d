"""Writes `saved/`: adapters and MoeLlavas, each with an input and the logits that it gave then, and a clusterer.

`python tests/golden/make_saved.py NAME ...` writes the folders of these names, all of them without a name. A folder
that is there stays as it is: what users have saved does not change either. Bases are not saved, but filled again from
a seed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_moe import InstructionClusterer, MoCLEConfig, MoExtendConfig, MoLEConfig
from peft_moe.models import MoeLlavaConfig, MoeLlavaForConditionalGeneration


SAVED = Path(__file__).parent / "saved"
KEPT = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
)
VOCABULARY = 32
IMAGE_TOKEN = 3
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**TEXT, "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts_per_tok": 2}


def filled(model: nn.Module, seed: str) -> nn.Module:
    """Give every parameter that trains numbers that depend on its name and `seed`, and on no library.

    `torch.rand` makes floats out of whole numbers, so that the bits are the same on every machine.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model.eval()


def tokens() -> dict[str, torch.Tensor]:
    """Three texts of eight tokens; the last one begins with padding."""
    input_ids = torch.randint(5, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    input_ids[2, :2] = 0
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def clustered_tokens() -> dict[str, torch.Tensor]:
    """Beside them, the cluster of each text."""
    return {**tokens(), "cluster_ids": torch.tensor([0, 4, 2])}


def image_and_tokens() -> dict[str, torch.Tensor]:
    """Each text begins with an image of four patches."""
    texts = torch.randint(5, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    input_ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), texts], dim=1)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def llava_fields() -> dict[str, Any]:
    """What a LLaVA and a MoeLlava share."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "vision_config": transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        "text_config": transformers.LlamaConfig(**TEXT),
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 4,
        "vision_feature_layer": -1,
    }


def moe_llava(**fields: Any) -> nn.Module:
    """A MoeLlava."""
    return MoeLlavaForConditionalGeneration(MoeLlavaConfig(**llava_fields(), **fields))


# model class → fields of its configuration
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**MOE, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def make_base(name: str) -> nn.Module:
    """A base model in float32 whose attention and experts are the eager ones."""
    if name == "moe_llava":
        model = moe_llava(num_experts=3, moe_layers="all")
    else:
        config, model_class, fields = BASES[name]
        made = getattr(transformers, config)(**fields)
        made._attn_implementation = "eager"
        made._experts_implementation = "eager"
        model = getattr(transformers, model_class)(made)
    return filled(model, name).requires_grad_(False)


def clusterer() -> InstructionClusterer:
    """Five clusters of embeddings with four numbers."""
    centroids = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)) - 0.5
    return InstructionClusterer(
        centroids, encoder="some/encoder", template="Question: {}", instruction_pattern="Q: (.*)"
    )


LORA = {"r": 2, "kernel_backend": "eager", "task_type": "CAUSAL_LM"}
MOCLE = {**LORA, "num_clusters": 5, "cluster_embedding_dim": 4, "num_experts": 3}
EXTEND = {"copy_sources": {0: 2, 1: 1}, "task_type": "CAUSAL_LM"}

# base → name → what makes the configuration
ADAPTERS: dict[str, dict[str, Callable[[], Any]]] = {
    "llama": {
        "mole": lambda: MoLEConfig(**LORA),
        "mole_paper": lambda: MoLEConfig.paper(**LORA),
        "mole_released_code": lambda: MoLEConfig.released_code(**LORA),
        "mole_module_scope": lambda: MoLEConfig(**LORA, router_scope="module", gate_scale="none"),
        "mole_no_bias_no_attention": lambda: MoLEConfig(
            **LORA, router_bias=False, lora_target_modules=None, normalize_top_k=False
        ),
        "mole_one_expert": lambda: MoLEConfig(**LORA, num_experts=1, top_k=1),
        "mole_patterns": lambda: MoLEConfig(
            **LORA,
            num_experts_pattern={"layers.0.mlp": 4},
            rank_pattern={"down_proj": 3},
            alpha_pattern={"up_proj": 5},
            use_rslora=True,
        ),
        "mole_named_targets": lambda: MoLEConfig(
            **LORA, target_modules=["up_proj", "down_proj"], layers_to_transform=[1], modules_to_save=["lm_head"]
        ),
        "mole_soft_q_proj": lambda: MoLEConfig(**LORA, target_modules=["q_proj"], soft=True),
        "mocle": lambda: MoCLEConfig(**MOCLE),
        "mocle_centroids": lambda: MoCLEConfig.from_clusterer(clusterer(), **LORA, num_experts=3),
        "mocle_released_code": lambda: MoCLEConfig.released_code(**MOCLE),
        "mocle_layer_embeddings": lambda: MoCLEConfig(
            **MOCLE, cluster_embedding_scope="layer", cluster_embedding_init="normal"
        ),
        "mocle_module_gates": lambda: MoCLEConfig(**MOCLE, gate_scope="module", gate_bias=True),
        "mocle_no_universal_expert": lambda: MoCLEConfig(**MOCLE, universal_expert=False),
        "mocle_top_2": lambda: MoCLEConfig(**MOCLE, top_k=2, temperature=1.0, rank_pattern={"down_proj": 3}),
        "mocle_fallback": lambda: MoCLEConfig(**MOCLE, fallback="universal"),
    },
    "mixtral": {
        "moextend": lambda: MoExtendConfig(**EXTEND),
        "moextend_low_rank": lambda: MoExtendConfig(**EXTEND, expert_type="lora", r=2),
        "moextend_paper_calibration": lambda: MoExtendConfig(
            layers=[0], copy_sources={0: 2}, calibration="paper", calibration_dim=4, task_type="CAUSAL_LM"
        ),
        "moextend_released_calibration": lambda: MoExtendConfig(
            **EXTEND, calibration="released_code", calibration_dim=4
        ),
        "moextend_guarded": lambda: MoExtendConfig(
            **EXTEND, init="copy_guarded", expert_type="lora", r=2, calibration="paper"
        ),
        "moextend_counts": lambda: MoExtendConfig(
            num_new_experts={0: 2, 1: 1}, copy_sources={0: [1, 3], 1: 0}, init="zero_gate", task_type="CAUSAL_LM"
        ),
    },
    "qwen2_moe": {"moextend_qwen2_moe": lambda: MoExtendConfig(**EXTEND)},
    "gpt_oss": {
        "moextend_gpt_oss": lambda: MoExtendConfig(**EXTEND),
        "moextend_gpt_oss_low_rank": lambda: MoExtendConfig(**EXTEND, expert_type="lora", r=2),
    },
    "deepseek_v3": {
        "moextend_deepseek_v3": lambda: MoExtendConfig(
            copy_sources={1: 3}, init="copy_guarded", layers=[1], task_type="CAUSAL_LM"
        )
    },
    "moe_llava": {"moextend_moe_llava": lambda: MoExtendConfig(**EXTEND)},
}
BASE_OF = {name: base for base, adapters in ADAPTERS.items() for name in adapters}
MODELS: dict[str, dict[str, Any]] = {
    "moe_llava": {},
    "moe_llava_counts": {"num_experts": [3, 2], "moe_layers": "all"},
    "moe_llava_residual": {"use_residual": True, "moe_layers": [1], "num_experts": 2, "norm_topk_prob": False},
    "moe_llava_released_code": {
        "router_drop": "position",
        "router_second_expert": "gumbel",
        "router_aux_loss_type": "moe_llava",
    },
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """What a model is given."""
    if name in MODELS or BASE_OF[name] == "moe_llava":
        return image_and_tokens()
    return clustered_tokens() if name.startswith("mocle") and name != "mocle_fallback" else tokens()


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model says."""
    with torch.no_grad():
        return model(**inputs).logits


def load(name: str) -> nn.Module:
    """What lies in `saved/`, on a base that is made again."""
    if name in BASE_OF:
        return PeftModel.from_pretrained(make_base(BASE_OF[name]), SAVED / name).eval()
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return MoeLlavaForConditionalGeneration.from_pretrained(SAVED / name, **settings).eval()


def make(name: str) -> None:
    """Write one folder."""
    inputs, expected = inputs_of(name), {}
    if name in BASE_OF:
        base = make_base(BASE_OF[name])
        expected["base_logits"] = logits_of(base, {k: v for k, v in inputs.items() if k != "cluster_ids"})
        model = get_peft_model(base, ADAPTERS[BASE_OF[name]][name]())
    else:
        model = moe_llava(**MODELS[name])
    with tempfile.TemporaryDirectory() as made:
        filled(model, name).save_pretrained(made)
        (SAVED / name).mkdir(parents=True)
        for file in KEPT:
            if Path(made, file).exists():
                shutil.copy(Path(made, file), SAVED / name)
    expected["logits"] = logits_of(load(name), inputs)
    save_file({**inputs, **expected}, SAVED / name / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*BASE_OF, *MODELS]:
        if not (SAVED / name).exists():
            make(name)
    if not (SAVED / "clusterer").exists():
        clusterer().save_pretrained(SAVED / "clusterer")
        (SAVED / "clusterer" / "README.md").unlink(missing_ok=True)
