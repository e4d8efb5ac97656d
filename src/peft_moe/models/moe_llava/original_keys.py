"""Names of tensors in original MoE-LLaVA checkpoints, and what they are called here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


Tensors = dict[str, torch.Tensor]

TEXT = "model.language_model."
PROJECTOR = {"0": "linear_1", "2": "linear_2"}
BUFFERS = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias|logn_tensor)$")
EXPERT = re.compile(r"deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)\.(weight|bias)$")


@dataclass(frozen=True)
class Family:
    """How one language model of MoE-LLaVA names its parts.

    Args:
        config_class (`str`): the configuration in transformers of the same architecture.
        gate (`str`, *optional*), up (`str`), down (`str`): linears of an MLP in the original.
        trunk (`str`): what the names of everything but the head begin with.
        renamed (`dict[str, str]`): parts with other names here, regular expression → replacement.
        config_fields (`dict[str, str]`): fields of the configuration with other names here.
        config_function: further fields of the configuration, from the original one.
    """

    config_class: str
    gate: str | None
    up: str
    down: str
    trunk: str = "model"
    renamed: dict[str, str] = field(default_factory=dict)
    config_fields: dict[str, str] = field(default_factory=dict)
    config_function: Callable[[dict], dict] = lambda config: {}

    @property
    def roles(self) -> dict[str, str]:
        """Name of a linear in the original → what it does."""
        names = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: role for role, name in names.items() if name is not None}


def _qwen_fields(config: dict) -> dict:
    # one of two equal halves in the original
    return {
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


GATED = ("gate_proj", "up_proj", "down_proj")
QWEN_NAMES = {
    r"\.ln_1\.": ".input_layernorm.",
    r"\.ln_2\.": ".post_attention_layernorm.",
    r"\.attn\.c_proj\.": ".self_attn.o_proj.",
    # the original computes w1(x) * silu(w2(x))
    r"\.mlp\.w2\.": ".mlp.gate_proj.",
    r"\.mlp\.w1\.": ".mlp.up_proj.",
    r"\.mlp\.c_proj\.": ".mlp.down_proj.",
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.": "model.",
    r"^model\.h\.": "model.layers.",
}
FAMILIES = {
    "moe_llava_stablelm": Family(
        "StableLmConfig", *GATED, config_fields={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
    ),
    "moe_llava_qwen": Family(
        "Qwen2Config",
        "w2",
        "w1",
        "c_proj",
        trunk="transformer",
        renamed=QWEN_NAMES,
        config_fields={
            "layer_norm_epsilon": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
            "kv_channels": "head_dim",
            "seq_length": "max_position_embeddings",
        },
        config_function=_qwen_fields,
    ),
    "moe_llava_phi": Family("PhiConfig", None, "fc1", "fc2"),
    "moe_llava_mistral": Family("MistralConfig", *GATED),
    "moe_llava_llama": Family("LlamaConfig", *GATED),
}


def convert_tensors(original: Tensors, family: Family, *, vision_prefix: str) -> tuple[Tensors, list[str], list[str]]:
    """Every tensor under the name and in the layout that it has here. Nothing is dropped without being listed.

    Args:
        original (`dict[str, torch.Tensor]`): the state dict of the original model; tensors may be on `meta`.
        family ([`Family`]): names of its language model.
        vision_prefix (`str`): what the names in the vision tower begin with here.

    Returns:
        The tensors, the names of buffers that are computed here instead of loaded, and the names that are not in the
        table.
    """
    converted: Tensors = {}
    buffers, unknown = [], []
    experts: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in original.items():
        if BUFFERS.search(key):
            buffers.append(key)
        elif match := EXPERT.search(key):
            number, linear, kind = match.groups()
            if linear not in family.roles:
                unknown.append(key)
                continue
            block = _text_name(key[: match.start()], family)
            suffix = "" if kind == "weight" else "_bias"
            experts[f"{block}experts."][int(number)][family.roles[linear] + suffix] = tensor
        else:
            found = _convert_one(key, tensor, family, vision_prefix)
            unknown.extend([] if found else [key])
            converted.update(found)
    for name, by_number in experts.items():
        converted.update({name + key: tensor for key, tensor in _stack(by_number, name).items()})
    return converted, buffers, unknown


def _convert_one(key: str, tensor: torch.Tensor, family: Family, vision_prefix: str) -> Tensors:
    body = re.sub(r"^(model|transformer)\.", "", key)
    if match := re.match(r"mm_projector\.image_spatial_proj\.(\d+)\.(weight|bias)$", body):
        linear = PROJECTOR.get(match[1])
        return {f"model.multi_modal_projector.{linear}.{match[2]}": tensor} if linear else {}
    if body.startswith("image_tower.image_tower.vision_model."):
        return {vision_prefix + body.removeprefix("image_tower.image_tower.vision_model."): tensor}
    if key in ("lm_head.weight", "lm_head.bias"):
        return {key: tensor}
    if match := re.search(r"\.attn\.c_attn\.(weight|bias)$", key):
        if not family.renamed:
            return {}
        place = _text_name(key[: match.start()], family)
        parts = tensor.chunk(3)
        return {f"{place}.self_attn.{n}_proj.{match[1]}": p for n, p in zip("qkv", parts, strict=True)}
    if not key.startswith(f"{family.trunk}."):
        return {}
    if body.startswith(("mm_projector.", "image_tower.", "video_tower.")):
        return {}
    return {_text_name(key, family): tensor}


def _text_name(key: str, family: Family) -> str:
    """The name here of a tensor of the language model that keeps its layout."""
    for pattern, replacement in family.renamed.items():
        key = re.sub(pattern, replacement, key)
    key = key.replace(".mlp.deepspeed_moe.gate.wg.", ".mlp.gate.")
    # DeepSpeed's residual mixture keeps the dense MLP as `mlp` inside the `mlp` of the layer
    key = key.replace(".mlp.mlp.", ".mlp.residual_mlp.").replace(".mlp.coefficient.", ".mlp.residual_gate.")
    return TEXT + key.removeprefix("model.")


def _stack(by_number: dict[int, Tensors], name: str) -> Tensors:
    numbers = sorted(by_number)
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{name} has the experts {numbers}: some are missing. Give every file of the checkpoint.")
    kinds = {tuple(sorted(tensors)) for tensors in by_number.values()}
    if len(kinds) > 1:
        raise ValueError(f"The experts of {name} do not have the same parts: {sorted(kinds)}.")
    result = {}
    for suffix in ("", "_bias"):
        if f"down{suffix}" not in by_number[0]:
            continue
        inputs = [role for role in (f"gate{suffix}", f"up{suffix}") if role in by_number[0]]
        first = "gate_up_proj" if f"gate{suffix}" in inputs else "up_proj"
        result[first + suffix] = torch.stack([torch.cat([by_number[e][role] for role in inputs]) for e in numbers])
        result[f"down_proj{suffix}"] = torch.stack([by_number[e][f"down{suffix}"] for e in numbers])
    return result


def vision_prefix_of(names: list[str]) -> str:
    """What tensors of the vision tower begin with in the installed transformers."""
    nested = "model.vision_tower.vision_model."
    return nested if any(name.startswith(nested) for name in names) else "model.vision_tower."
