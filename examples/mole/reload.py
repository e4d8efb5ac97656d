"""Load a saved adapter in a process of its own, and write the logits that it gives for a saved batch to a file.

python examples/mole/reload.py <adapter folder> <batch.safetensors> <logits.safetensors>
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

import peft_moe  # noqa: F401  makes MoLE adapters known to PEFT


def main(adapter: str, batch_file: str, logits_file: str) -> None:
    batch = load_file(batch_file)
    torch.set_num_threads(int(batch.pop("num_threads")))
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float32")
    with torch.no_grad():
        save_file({"logits": model(**batch).logits.contiguous()}, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
