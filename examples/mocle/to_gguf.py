"""Turns LoRA adapters of Llama models that PEFT wrote into GGUF files for llama.cpp.

`python to_gguf.py adapters/cluster_0 --base folder/of/the/base/model` writes `adapters/cluster_0.gguf`; several
adapters may be named. Needs the packages `gguf`, `peft`, `safetensors`, `torch` and `transformers`, but not
`peft_moe`.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import gguf
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig


MODEL_TYPES = ("llama", "mistral")
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def convert(adapter: str | Path, base: PretrainedConfig, output: str | Path) -> Path:
    """Write one adapter as GGUF.

    llama.cpp multiplies by `alpha / rank of the tensor` and knows no other scaling (`use_rslora`, `alpha_pattern`), so
    what is left of PEFT's scaling goes into B. For an adapter written by `export_cluster_lora` nothing is left.

    Args:
        adapter: the folder, with `adapter_config.json` and `adapter_model.safetensors`.
        base: the configuration of the base model.
        output: the file to write.

    Raises:
        ValueError: the base model is no Llama, or the adapter holds something that llama.cpp does not take.
    """
    if base.model_type not in MODEL_TYPES:
        raise ValueError(
            f"The base model is {base.model_type!r}, but this script knows {' and '.join(MODEL_TYPES)}. Use "
            "convert_lora_to_gguf.py of llama.cpp."
        )
    config = LoraConfig.from_pretrained(str(adapter))
    if config.use_dora or config.bias != "none":
        raise ValueError(f"{adapter} uses DoRA or trains biases, which a GGUF adapter cannot hold.")
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    if other := [key for key in tensors if not LORA_KEY.fullmatch(key)]:
        raise ValueError(
            f"{adapter} holds {len(other)} tensors that are no LoRA, such as {other[0]}: a GGUF adapter cannot hold "
            "them. Merge the adapter into its base model, and convert that."
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.num_hidden_layers)
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
    for key, tensor in tensors.items():
        module, part = LORA_KEY.fullmatch(key).groups()
        if (name := names.get_name(module)) is None:
            raise ValueError(f"{adapter} adapts {module}, which llama.cpp has no name for.")
        tensor = tensor.float()
        if part == "B":
            tensor = for_rope(module, tensor, base) * _scaling_left(config, module, rank=tensor.shape[1])
        writer.add_tensor(f"{name}.weight.lora_{part.lower()}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(output)


def for_rope(module: str, weight: torch.Tensor, base: PretrainedConfig) -> torch.Tensor:
    """Rows of query and key projections `(O, ...)` in the order of llama.cpp, which rotates neighbours, not halves."""
    num_heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}.get(module.rpartition(".")[2])
    if num_heads is None:
        return weight
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _scaling_left(config: LoraConfig, module: str, *, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return scaling / (config.lora_alpha / rank)


def main() -> None:
    """Converts the adapters that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path, help="folders that PEFT wrote")
    parser.add_argument("--base", required=True, help="folder or Hub id of the base model")
    arguments = parser.parse_args()
    base = AutoConfig.from_pretrained(arguments.base)
    for adapter in arguments.adapters:
        try:
            print(convert(adapter, base, adapter.with_name(f"{adapter.name}.gguf")))
        except (OSError, ValueError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
