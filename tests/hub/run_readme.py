"""Runs the first program of the README as it stands there, on a tiny model, data and trainer settings for a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import trl
from outcomes import FOLDER, expect, finish

from tiny_models import tiny_llama, tiny_tokenizer, token_batch


README = Path(__file__).parents[2] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for message in messages %}w1 {{ message['content'] }} w2 {% endfor %}"


def conversations(name: str, split: str) -> datasets.Dataset:
    """In the place of what would be downloaded."""
    assert (name, split) == ("trl-lib/Capybara", "train")
    turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]
    return datasets.Dataset.from_list([{"messages": turns}] * 8)


tokenizer = tiny_tokenizer()
tokenizer.chat_template = TEMPLATE
tiny_llama().push_to_hub(MODEL)
tokenizer.push_to_hub(MODEL)
datasets.load_dataset = conversations
settings = trl.SFTConfig(str(FOLDER / "out"), use_cpu=True, bf16=False, report_to="none", logging_steps=1)
trl.SFTTrainer = partial(trl.SFTTrainer, args=settings)
program = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
assert program is not None
names: dict = {}
os.chdir(FOLDER)
exec(compile(program.group(1), "README.md", "exec"), names)
command = re.search(r"in a shell: hf (.*)", program.group(1))
assert command is not None
subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *command.group(1).split()], check=True)

model = names["model"]
expect("readme", model, token_batch(num_padding=0))
weights = {
    name: float(value.abs().max()) for name, value in model.named_parameters() if "_B." in name and value.requires_grad
}
finish({"trained": sum(size > 0 for size in weights.values()), "parameters": len(weights)})
