"""Turns a checkpoint of the original MoE-LLaVA code into a MoeLlava folder that transformers loads, without DeepSpeed.

python -m peft_moe.models.moe_llava.convert_original MoE-LLaVA-Phi2-2.7B-4e converted --dry_run
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, LlavaProcessor

from .configuration_moe_llava import MoeLlavaConfig
from .modeling_moe_llava import MoeLlavaForConditionalGeneration


Tensors = dict[str, torch.Tensor]

IMAGE_TOKEN = "<image>"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
ROTARY_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
LOST = (
    "The second expert was sampled with Gumbel noise in evaluation too; here evaluation takes the second best, so "
    "answers of the original cannot be repeated exactly.",
    "Experts had a limited capacity and dropped tokens by their position in the batch; here nothing is dropped unless "
    "released_routing is set.",
    "ep_size, train_modules and optimizer states of DeepSpeed have no counterpart.",
)


TEXT = "model.language_model."
NOT_OF_TEXT = ("mm_projector.", "image_tower.", "video_tower.")
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


@dataclass
class Conversion:
    """What a conversion did, or would do; `str(conversion)` says it in words.

    Args:
        config ([`MoeLlavaConfig`]): of the new model.
        sources (`list[str]`): names in the original.
        targets (`dict[str, tuple[int, ...]]`): names and shapes here.
        notes (`list[str]`): what was left out, made up, or behaves otherwise.
    """

    config: MoeLlavaConfig
    sources: list[str]
    targets: dict[str, tuple[int, ...]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        config = self.config
        counts = config.num_experts_by_layer
        lines = [
            f"{len(self.sources)} tensors of the original become {len(self.targets)}.",
            f"{type(config.text_config).__name__}, mixtures in layers {list(counts)} with {list(counts.values())} "
            f"experts, {config.num_experts_per_tok} per token.",
            "What does not carry over:",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def convert(
    source: str | Path,
    target: str | Path | None,
    *,
    vision_tower: str | Path | None = None,
    image_token_index: int | None = None,
    released_routing: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Convert a checkpoint of MoE-LLaVA on StableLM, Qwen, Phi-2, Mistral (OpenChat) or Llama.

    Args:
        source (`str`): folder of the original, with `config.json` and the weights.
        target (`str`, *optional*): folder to write. Not needed with `dry_run`.
        vision_tower (`str`, *optional*):
            Folder or Hub name of the vision tower; by default the one that the original names. Its weights are used
            where the checkpoint holds none.
        image_token_index (`int`, *optional*):
            Token that stands for a piece of image, which the original does not have. By default the id that the
            tokenizer gives to `<image>`; without a tokenizer that transformers loads, a new one after the vocabulary.
        released_routing (`bool`): also route as the released training scripts did: capacity by position, Gumbel noise.
        dry_run (`bool`): check that every tensor has its place, and write nothing.

    Returns:
        [`Conversion`].

    Raises:
        ValueError: the model is of another kind, or names or shapes of tensors do not fit; all of them are listed.
        FileNotFoundError: the folder holds no weights.

    Example:

    ```py
    >>> print(convert("MoE-LLaVA-Phi2-2.7B-4e", None, dry_run=True))
    ```
    """
    if target is None and not dry_run:
        raise ValueError("convert needs a target folder. Name one, or use dry_run=True.")
    source = Path(source)
    original_config = json.loads((source / "config.json").read_text())
    family = _family_of(original_config)
    vision_tower = vision_tower or original_config.get("mm_image_tower")
    if vision_tower is None:
        raise ValueError("config.json names no mm_image_tower. Name the vision tower by vision_tower=...")
    original = _load_tensors(source, on_meta=dry_run)

    notes = list(LOST)
    tokenizer, tokenizer_note = _tokenizer(source)
    notes += [tokenizer_note] if tokenizer_note else []
    if image_token_index is None:
        image_token_index = (
            original_config["vocab_size"] if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        )
    config = _config(original_config, family, vision_tower, image_token_index, released_routing)
    config.lm_head_bias = "lm_head.bias" in original
    notes += _notes_of(original_config)

    with torch.device("meta"):
        model = MoeLlavaForConditionalGeneration(config)
    wanted = model.state_dict()
    prefix = vision_prefix_of(list(wanted))
    tensors, buffers, unknown = convert_tensors(original, family, vision_prefix=prefix)
    if buffers:
        notes.append(f"{len(buffers)} buffers are computed instead of loaded, {buffers[0]} the first of them.")
    notes += _add_vision_tower(tensors, wanted, vision_tower, dry_run=dry_run)
    notes += _add_image_token(tensors, config)
    if config.text_config.tie_word_embeddings and EMBEDDINGS in tensors:
        tensors.setdefault("lm_head.weight", tensors[EMBEDDINGS])
    _check(tensors, wanted, unknown)

    conversion = Conversion(config, list(original), {name: tuple(t.shape) for name, t in tensors.items()}, notes)
    if not dry_run:
        _save(model, tensors, Path(target), tokenizer, vision_tower, original_config, conversion)
    return conversion


def _family_of(config: dict[str, Any]) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"config.json has model_type {model_type!r}, but the converter knows {known}.")
    if not config.get("moe", {}).get("num_experts"):
        raise ValueError(
            "config.json says nothing about experts (moe.num_experts), so this is a model of stage I or II. Convert "
            "it to a LLaVA, and use MoeLlavaForConditionalGeneration.from_dense."
        )
    projector = config.get("image_projector_type")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"The projector is {projector!r}, but LLaVA in transformers has two linears with GELU ('mlp2x_gelu')."
        )
    return FAMILIES[model_type]


def _load_tensors(folder: Path, *, on_meta: bool) -> Tensors:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin, but {found}.")
    tensors: Tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                loaded = {key: opened.get_tensor(key) for key in opened.keys()}
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors.update({key: tensor.to("meta") if on_meta else tensor for key, tensor in loaded.items()})
    return tensors


def _tokenizer(folder: Path) -> tuple[Any, str | None]:
    """The tokenizer with a token for images, and why there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, (
            f"The tokenizer cannot be loaded without code of its own ({reason}), so no processor was written. Add the "
            f"token {IMAGE_TOKEN!r} with the id image_token_index to it by hand."
        )
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer, None


def _config(
    original: dict[str, Any], family: Family, vision_tower: Any, image_token_index: int, released_routing: bool
) -> MoeLlavaConfig:
    config_class = getattr(transformers, family.config_class)
    accepted = {*config_class().to_dict(), *ROTARY_FIELDS} - {"model_type", "architectures", "transformers_version"}
    fields = {family.config_fields.get(name, name): value for name, value in original.items()}
    fields.update(family.config_function(original))
    fields = {name: value for name, value in fields.items() if name in accepted and value is not None}
    fields["vocab_size"] = max(original["vocab_size"], image_token_index + 1)
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    strategy = {"patch": "default", "cls_patch": "full"}[original.get("mm_vision_select_feature", "patch")]
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    has_class_token = vision_config.model_type == "clip_vision_model"
    moe = original["moe"]
    top_k = moe.get("top_k_experts", 2)
    second_expert = "gumbel" if top_k == 2 else "top"
    routing = {"router_drop": "position", "router_second_expert": second_expert} if released_routing else {}
    counts, layers = list(moe["num_experts"]), list(moe["moe_layers_idx"])
    return MoeLlavaConfig(
        vision_config=vision_config,
        text_config=config_class(**fields),
        image_token_index=image_token_index,
        image_seq_length=num_patches + has_class_token - (strategy == "default"),
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        moe_layers=layers,
        num_experts=counts[0] if len(set(counts)) == 1 else counts,
        num_experts_per_tok=top_k,
        norm_topk_prob=top_k > 1,
        use_residual=bool(moe.get("use_residual", False)),
        router_capacity_factor=moe.get("capacity_factor", 1.0),
        router_eval_capacity_factor=moe.get("eval_capacity_factor", 1.0),
        router_min_capacity=moe.get("min_capacity", 4),
        router_aux_loss_coef=moe.get("router_aux_loss_coef", 0.01),
        router_aux_loss_type="moe_llava",
        **routing,
    )


def _notes_of(config: dict[str, Any]) -> list[str]:
    notes = []
    if config["model_type"] == "moe_llava_qwen" and (config.get("use_dynamic_ntk") or config.get("use_logn_attn")):
        notes.append(
            f"Qwen's scaling of attention beyond {config.get('seq_length')} tokens (use_dynamic_ntk, use_logn_attn)."
        )
    if config.get("mm_use_im_start_end"):
        notes.append("Prompts put <im_start> and <im_end> around an image (mm_use_im_start_end): write them yourself.")
    if config.get("mm_video_tower"):
        notes.append("Videos (mm_video_tower): only the image side is converted.")
    return notes


def _add_vision_tower(tensors: Tensors, wanted: Tensors, vision_tower: Any, *, dry_run: bool) -> list[str]:
    names = [name for name in wanted if name.startswith("model.vision_tower.")]
    if any(name in tensors for name in names):
        return []
    if dry_run:
        tensors.update({name: wanted[name] for name in names})
    else:
        loaded = AutoModel.from_pretrained(vision_tower)
        state = getattr(loaded, "vision_model", loaded).state_dict()
        prefix = vision_prefix_of(names)
        tensors.update({prefix + name.removeprefix("vision_model."): tensor for name, tensor in state.items()})
    return [f"The checkpoint holds no vision tower: its weights are those of {vision_tower}."]


def _add_image_token(tensors: Tensors, config: MoeLlavaConfig) -> list[str]:
    """Rows for the token of images, as the mean of all others, where the vocabulary has none to spare."""
    grown = []
    for name in (EMBEDDINGS, "lm_head.weight", "lm_head.bias"):
        if name in tensors and (missing := config.text_config.vocab_size - tensors[name].shape[0]) > 0:
            mean = tensors[name].float().mean(dim=0, keepdim=True).to(tensors[name].dtype)
            tensors[name] = torch.cat([tensors[name], mean.expand(missing, *mean.shape[1:])])
            grown.append(name)
    if not grown:
        return []
    return [
        f"{IMAGE_TOKEN!r} is token {config.image_token_index}: {', '.join(grown)} got rows that are the mean of all."
    ]


def _check(tensors: Tensors, wanted: Tensors, unknown: Iterable[str]) -> None:
    problems = [f"{name} of the original is not in the table" for name in unknown]
    problems += [f"{name} has no counterpart here" for name in tensors if name not in wanted]
    problems += [f"{name} was not found in the original" for name in wanted if name not in tensors]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"The checkpoint cannot be converted, {len(problems)} tensors do not fit:\n{listed}")


def _save(
    model: MoeLlavaForConditionalGeneration,
    tensors: Tensors,
    target: Path,
    tokenizer: Any,
    vision_tower: Any,
    original_config: dict[str, Any],
    conversion: Conversion,
) -> None:
    dtype = tensors[EMBEDDINGS].dtype
    tensors = {name: t.float() if name.endswith(".mlp.gate.weight") else t.to(dtype) for name, t in tensors.items()}
    model.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(target)
    if tokenizer is None:
        return
    config = model.config
    image_processor = AutoImageProcessor.from_pretrained(vision_tower)
    if original_config.get("image_aspect_ratio") == "pad":
        settings = image_processor.to_dict()
        kept = ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop")
        image_processor = transformers.LlavaImageProcessor(
            do_pad=True, **{name: settings[name] for name in kept if settings.get(name) is not None}
        )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
    ).save_pretrained(target)
    conversion.notes.append("No chat template: the processor expects a finished prompt with <image> in it.")


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
    is_of_text = key.startswith(f"{family.trunk}.") and not body.startswith(NOT_OF_TEXT)
    return {_text_name(key, family): tensor} if is_of_text else {}


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


def main() -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of the original checkpoint")
    parser.add_argument("target", nargs="?", help="folder to write")
    parser.add_argument("--vision_tower", help="folder or Hub name; default: the one that the original names")
    parser.add_argument("--image_token_index", type=int)
    parser.add_argument("--released_routing", action="store_true", help="capacity by position and Gumbel noise")
    parser.add_argument("--dry_run", action="store_true", help="check every tensor and write nothing")
    options = vars(parser.parse_args())
    try:
        print(convert(options.pop("source"), options.pop("target"), **options))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
