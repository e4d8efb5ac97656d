"""A whole language model with MoLE beside plain LoRA of the same rank on the same linears: step, decode, memory.

    python benchmarks/whole_model.py --name cpu_whole_model

Each contender runs in a process of its own for the memory figure, and interleaved with the others in one process for the
times; medians of CPU time of one thread. Writes `benchmarks/results/<name>.json` and prints the table.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_moe
from peft_moe import MoLEConfig


RESULTS = Path(__file__).parent / "results"
CONTENDERS = ("lora", "mole_top1", "mole_top2", "mole_soft")
TARGETS = {"step": 1.10, "decode": 1.15, "memory": 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu_whole_model")
    parser.add_argument(
        "--model", default=None, help="a model folder; default: random weights in SmolLM2-135M's shape"
    )
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, default=256)
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    found = {"step": step_times(options), "decode": decode_times(options), "memory": memories(options)}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"machine": platform.machine(), "processor": cpu_name(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "peft_moe": peft_moe.__version__,
        },
        "settings": {key: value for key, value in vars(options).items() if key != "memory_of"},
        "targets": TARGETS,
        "cells": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(found)


def build(contender: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    if options.model:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    else:
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=options.layers or 30,
                num_attention_heads=9,
                num_key_value_heads=3,
                vocab_size=49152,
                tie_word_embeddings=True,
            )
        )
    if contender == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config: Any = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    else:
        choice = {
            "mole_top1": {"top_k": 1},
            "mole_top2": {"top_k": 2, "gate_scale": "prob"},
            "mole_soft": {"soft": True},
        }[contender]
        config = MoLEConfig(num_experts=4, r=8, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM", **choice)
    return get_peft_model(base, config)


def batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 49152, (options.batch_size, options.num_tokens))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train_step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model.train()
    model(**inputs).loss.backward()
    model.zero_grad()


def step_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward, one value per round."""
    inputs = batch(options)
    return interleave(
        {name: build(name, options) for name in CONTENDERS}, lambda m: train_step(m, inputs), options.rounds
    )


def decode_times(options: argparse.Namespace, num_new_tokens: int = 16) -> dict[str, list[float]]:
    """Seconds per token of greedy decoding with a key-value cache, after a prompt of 16 tokens."""
    prompt = torch.randint(0, 49152, (1, 16))

    def decode(model: Any) -> None:
        model.eval()
        model.generate(
            input_ids=prompt,
            min_new_tokens=num_new_tokens,
            max_new_tokens=num_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    times = interleave({name: build(name, options) for name in CONTENDERS}, decode, options.rounds)
    return {name: [seconds / num_new_tokens for seconds in found] for name, found in times.items()}


def interleave(models: dict[str, Any], run: Any, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            start = time.thread_time()
            run(model)
            if round_:
                times[name].append(time.thread_time() - start)
    return times


def memories(options: argparse.Namespace) -> dict[str, list[float]]:
    """MiB that a training step needs beyond the loaded model, one process per contender."""
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--memory_of", name, "--batch_size", str(options.batch_size)]
        command += ["--num_tokens", str(options.num_tokens)]
        command += ["--model", options.model] if options.model else []
        command += ["--layers", str(options.layers)] if options.layers else []
        found[name] = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ]
    return found


def peak_memory(contender: str, options: argparse.Namespace) -> float:
    model, inputs = build(contender, options), batch(options)
    with open("/proc/self/statm") as file:
        before_mib = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    for _ in range(2):
        train_step(model, inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before_mib


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    units = {"step": "s", "decode": "s/token", "memory": "MiB"}
    print(f"{'':<10}{'':<8}" + "".join(f"{name:>22}" for name in CONTENDERS) + f"{'target':>9}")
    for what, cells in found.items():
        lora = statistics.median(cells["lora"])
        row = "".join(
            f"{statistics.median(cells[name]):>14.3f} ({statistics.median(cells[name]) / lora:.2f}x)"
            for name in CONTENDERS
        )
        print(f"{what:<10}{units[what]:<8}{row}{TARGETS[what]:>8.2f}x")


if __name__ == "__main__":
    main()
