"""Conversion of original MoE-LLaVA checkpoints, on synthetic ones that are made by inverting the table of names.

This shows that the converter agrees with the table, not that the table agrees with a released checkpoint.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoModel, CLIPImageProcessor, LlavaProcessor
from transformers.utils import is_torchvision_available

from models.tiny_llava import IMAGE_TOKEN, VOCABULARY, image_batch, llava_fields, tiny_processor
from peft_moe.models import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava.convert_original import convert


class Family(NamedTuple):
    """Backbone here, what the original calls (gate, up, down), and fields of the configuration here and there."""

    backbone: str
    linears: tuple[str | None, str, str]
    here: dict[str, Any]
    there: dict[str, Any]


GATED = ("gate_proj", "up_proj", "down_proj")
LLAMA, PHI = {"rope_theta": 5000.0, "rms_norm_eps": 1e-3}, {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-3}
QWEN = {"layer_norm_epsilon": 1e-3, "rotary_emb_base": 5000.0, "kv_channels": 8, "seq_length": 64}
FAMILIES = {
    "stablelm": Family(
        "stablelm",
        GATED,
        {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3, "use_qkv_bias": True},
        {"rope_pct": 0.5, "norm_eps": 1e-3, "use_qkv_bias": True},
    ),
    "qwen": Family("qwen2", ("w2", "w1", "c_proj"), {**LLAMA, "num_key_value_heads": 4, "head_dim": 8}, QWEN),
    "phi": Family("phi", (None, "fc1", "fc2"), PHI, PHI),
    "mistral": Family("mistral", GATED, LLAMA, LLAMA),
    "llama": Family("llama", GATED, LLAMA, LLAMA),
}
# names here → in the original, where T is the trunk of the language model
RENAMED = {
    r"^model\.vision_tower\.(vision_model\.)?": "T.image_tower.image_tower.vision_model.",
    r"^model\.multi_modal_projector\.linear_1": "T.mm_projector.image_spatial_proj.0",
    r"^model\.multi_modal_projector\.linear_2": "T.mm_projector.image_spatial_proj.2",
    r"^model\.language_model\.": "T.",
    r"\.mlp\.gate\.weight$": ".mlp.deepspeed_moe.gate.wg.weight",
    r"\.mlp\.residual_gate\.": ".mlp.coefficient.",
    r"\.mlp\.residual_mlp\.": ".mlp.mlp.",
}
# Qwen's first architecture
RENAMED_QWEN = {
    ".embed_tokens.": ".wte.",
    "transformer.norm.": "transformer.ln_f.",
    "transformer.layers.": "transformer.h.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".self_attn.o_proj.": ".attn.c_proj.",
}


def sparse_model(family: str, **fields) -> MoeLlavaForConditionalGeneration:
    """Random, with biases and norms that are not trivial."""
    torch.manual_seed(0)
    common = {**llava_fields(FAMILIES[family].backbone, **FAMILIES[family].here), "vision_feature_layer": -2}
    model = MoeLlavaForConditionalGeneration(
        MoeLlavaConfig(**common, lm_head_bias=family == "phi", moe_layers=[0, 2], **fields)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def original_state(model: MoeLlavaForConditionalGeneration, family: str, *, vision: bool = True) -> dict:
    """The state dict as MoE-LLaVA and DeepSpeed name it."""
    gate, up, down = FAMILIES[family].linears
    linears = dict(zip(GATED, (gate, up, down), strict=True)) if gate else {}
    trunk = "transformer" if family == "qwen" else "model"
    state = {}
    for name, tensor in model.state_dict().items():
        for here, there in RENAMED.items():
            name = re.sub(here, there.replace("T.", f"{trunk}."), name)
        if match := re.fullmatch(r"(.*\.mlp)\.experts\.(\w+?)(_bias)?", name):
            kind = "bias" if match[3] else "weight"
            parts = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}[match[2]]
            for expert, own in enumerate(tensor):
                for part, piece in zip(parts, own.chunk(len(parts)), strict=True):
                    place = f"{match[1]}.deepspeed_moe.experts.deepspeed_experts.{expert}.{part}.{kind}"
                    state[place] = piece.clone()
        elif vision or "image_tower" not in name:
            name = re.sub(r"(\.mlp)\.(\w+_proj)\.", lambda match: f"{match[1]}.{linears[match[2]]}.", name)
            state[name] = tensor.clone()
    return as_qwen(state) if family == "qwen" else state


def as_qwen(state: dict) -> dict:
    """The names of Qwen's first architecture, with queries, keys and values in one linear."""
    renamed = {}
    for name, tensor in state.items():
        for here, there in RENAMED_QWEN.items() if "image_tower" not in name else ():
            name = name.replace(here, there)
        renamed[name] = tensor
    for name in [name for name in renamed if name.startswith("transformer.h.") and ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        renamed[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts)
    return renamed


def original_config(model: MoeLlavaForConditionalGeneration, family: str, vision_tower: Path) -> dict:
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {name: getattr(text, name) for name in names if family != "qwen" or name != "num_key_value_heads"}
    return {
        **fields,
        "model_type": f"moe_llava_{family}",
        "intermediate_size": text.intermediate_size * (2 if family == "qwen" else 1),
        "mm_image_tower": str(vision_tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        "moe": {
            "moe_enable": True,
            "moe_mode": "sparse",
            "moe_layers_idx": [0, 2],
            "num_experts": [4, 4],
            "ep_size": 1,
            "top_k_experts": model.config.num_experts_per_tok,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "use_residual": model.config.use_residual,
            "router_aux_loss_coef": 0.02,
            "train_modules": ["wg"],
        },
        **FAMILIES[family].there,
    }


def write_original(folder: Path, model, family: str, *, state: dict | None = None, vision: bool = True) -> Path:
    source, tower = folder / "original", folder / "tower"
    source.mkdir()
    AutoModel.from_config(model.config.vision_config).save_pretrained(tower)
    (source / "config.json").write_text(json.dumps(original_config(model, family, tower)))
    state = original_state(model, family, vision=vision) if state is None else state
    torch.save(state, source / "pytorch_model.bin")
    return source


load = MoeLlavaForConditionalGeneration.from_pretrained


def logits_of(model, image_token: int) -> torch.Tensor:
    batch = image_batch(num_padding=2)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, image_token)
    with torch.no_grad():
        return model(**batch).logits[..., :VOCABULARY]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_after_the_round_trip(tmp_path, family):
    model = sparse_model(family)
    source = write_original(tmp_path, model, family)
    conversion = convert(source, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert torch.equal(logits_of(converted, VOCABULARY), logits_of(model, IMAGE_TOKEN))
    assert converted.config.router_aux_loss_coef == 0.02
    assert converted.config.lm_head_bias is (family == "phi")
    assert converted.lm_head.out_features == VOCABULARY + 1
    assert "<image>' is token 64" in str(conversion)
    assert "Gumbel" in str(conversion)


def test_gate_and_up_are_not_swapped():
    model = sparse_model("qwen")
    state = original_state(model, "qwen")
    place = "transformer.h.0.mlp.deepspeed_moe.experts.deepspeed_experts.1"
    experts = model.model.language_model.layers[0].mlp.experts
    # the original computes c_proj(w1(x) * silu(w2(x)))
    assert torch.equal(experts.gate_up_proj[1, :48], state[f"{place}.w2.weight"])
    assert torch.equal(experts.gate_up_proj[1, 48:], state[f"{place}.w1.weight"])


@pytest.mark.parametrize("family", ["phi", "qwen", "mistral"])
def test_residual_experts_and_one_expert_per_token_carry_over(tmp_path, family):
    model = sparse_model(family, use_residual=True, num_experts_per_tok=1, norm_topk_prob=False)
    convert(write_original(tmp_path, model, family), tmp_path / "converted")
    converted = load(tmp_path / "converted")
    # products of other torch versions differ in the last bit where weights lie at another address
    torch.testing.assert_close(logits_of(converted, VOCABULARY), logits_of(model, IMAGE_TOKEN), rtol=0, atol=1e-6)


def test_sharded_safetensors_are_read(tmp_path):
    model = sparse_model("mistral")
    source = write_original(tmp_path, model, "mistral")
    (source / "pytorch_model.bin").unlink()
    state = original_state(model, "mistral")
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, source / f"model-0000{number}.safetensors")
    convert(source, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert torch.equal(logits_of(converted, VOCABULARY), logits_of(model, IMAGE_TOKEN))


def test_a_vision_tower_that_was_not_saved_is_loaded(tmp_path):
    model = sparse_model("phi")
    source = write_original(tmp_path, model, "phi", vision=False)
    conversion = convert(source, tmp_path / "converted")
    converted = load(tmp_path / "converted")
    tower = AutoModel.from_pretrained(tmp_path / "tower").state_dict()
    found = converted.model.vision_tower.state_dict()
    assert found.keys() == tower.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tower.items())
    assert any("holds no vision tower" in note for note in conversion.notes)


def test_half_precision_is_kept_but_for_the_router(tmp_path):
    model = sparse_model("mistral")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in original_state(model, "mistral").items()}
    convert(write_original(tmp_path, model, "mistral", state=state), tmp_path / "converted")
    converted = load(tmp_path / "converted")
    block = converted.model.language_model.layers[0].mlp
    assert block.experts.down_proj.dtype == torch.bfloat16
    assert block.gate.weight.dtype == torch.float32


# with one expert per token there is no second one to sample
@pytest.mark.parametrize(("top_k", "second_expert"), [(2, "gumbel"), (1, "top")])
def test_released_routing_is_a_choice(tmp_path, top_k, second_expert):
    source = write_original(tmp_path, sparse_model("phi", num_experts_per_tok=top_k), "phi")
    config = convert(source, None, dry_run=True).config
    assert (config.router_drop, config.router_second_expert, config.router_aux_loss_type) == (None, "top", "moe_llava")
    config = convert(source, None, dry_run=True, released_routing=True).config
    assert (config.router_drop, config.router_second_expert) == ("position", second_expert)
    assert (config.router_capacity_factor, config.router_eval_capacity_factor) == (1.5, 2.0)


def test_buffers_are_dropped_and_named(tmp_path):
    model = sparse_model("llama")
    state = original_state(model, "llama")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    source = write_original(tmp_path, model, "llama", state=state)
    notes = convert(source, None, dry_run=True).notes
    assert any("1 buffers are computed instead of loaded, model.layers.0.self_attn" in note for note in notes)


def test_a_dry_run_writes_nothing_and_finds_the_same_problems(tmp_path):
    source = write_original(tmp_path, sparse_model("phi"), "phi")
    before = sorted(tmp_path.rglob("*"))
    printed = str(convert(source, tmp_path / "converted", dry_run=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert "PhiConfig, mixtures in layers [0, 2] with [4, 4] experts, 2 per token" in printed


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    model = sparse_model("phi")
    state = original_state(model, "phi")
    del state["model.layers.1.mlp.fc1.bias"]
    state["model.layers.0.self_attn.extra.weight"] = torch.zeros(2)
    state["optimizer.step"] = torch.zeros(1)
    state["model.mm_projector.video_patch_proj.weight"] = torch.zeros(1)
    state["model.mm_projector.image_spatial_proj.0.bias"] = torch.zeros(7)
    source = write_original(tmp_path, model, "phi", state=state)
    with pytest.raises(ValueError, match="5 tensors do not fit") as error:
        convert(source, tmp_path / "converted")
    text = str(error.value)
    assert "model.language_model.layers.1.mlp.fc1.bias was not found in the original" in text
    assert "model.language_model.layers.0.self_attn.extra.weight has no counterpart here" in text
    assert "optimizer.step of the original is not in the table" in text
    assert "model.mm_projector.video_patch_proj.weight of the original is not in the table" in text
    assert "model.multi_modal_projector.linear_1.bias has shape (7,) instead of (32,)" in text
    assert not (tmp_path / "converted").exists()


def test_missing_experts_are_named(tmp_path):
    model = sparse_model("phi")
    state = original_state(model, "phi")
    state = {name: tensor for name, tensor in state.items() if "layers.2.mlp" not in name or "_experts.1." not in name}
    source = write_original(tmp_path, model, "phi", state=state)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\. has the experts \[0, 2, 3\]: some are missing"):
        convert(source, None, dry_run=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "moe_llava_minicpm"}, "'moe_llava_minicpm', but the converter knows moe_llava_stablelm"),
        ({"moe": {}}, "says nothing about experts"),
        ({"image_projector_type": "linear"}, "The projector is 'linear'"),
        ({"mm_image_tower": None}, "names no mm_image_tower"),
    ],
    ids=["another-model", "dense", "another-projector", "no-tower"],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    source = write_original(tmp_path, sparse_model("phi"), "phi")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        convert(source, None, dry_run=True)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    source = write_original(tmp_path, sparse_model("phi"), "phi")
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="but config.json"):
        convert(source, None, dry_run=True)


def test_a_target_is_needed_unless_it_is_a_dry_run(tmp_path):
    with pytest.raises(ValueError, match="needs a target folder"):
        convert(tmp_path, None)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17") and not is_torchvision_available(),
    reason="older transformers reads image processors with torchvision only",
)
def test_the_tokenizer_gets_a_token_for_images(tmp_path):
    source = write_original(tmp_path, sparse_model("phi"), "phi")
    processor = tiny_processor()
    processor.tokenizer.save_pretrained(source)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path / "tower")
    convert(source, tmp_path / "converted")
    written = LlavaProcessor.from_pretrained(tmp_path / "converted")
    converted = load(tmp_path / "converted")
    assert converted.config.image_token_index == IMAGE_TOKEN
    assert converted.lm_head.out_features == VOCABULARY
    image = torch.randint(0, 255, (3, 20, 16), dtype=torch.uint8)
    inputs = written(images=image, text="<image> a b", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == converted.config.image_seq_length == 4
    with torch.no_grad():
        assert torch.isfinite(converted(**inputs).logits).all()


@pytest.mark.slow
def test_command_line(tmp_path):
    source = write_original(tmp_path, sparse_model("phi"), "phi")
    command = [sys.executable, "-m", "peft_moe.models.moe_llava.convert_original", str(source)]
    run = subprocess.run([*command, "--dry_run"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "What does not carry over" in run.stdout
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "needs a target folder" in run.stderr
