"""A whole language model with MoLE or MoCLE beside plain LoRA on the same linears: step, decode, memory.

    python benchmarks/whole_model.py --name cpu_whole_model
    python benchmarks/whole_model.py --method mocle --name cpu_whole_model_mocle

LoRA has the rank of one expert of MoLE; for MoCLE the rank that is active for an example, expert and universal expert.

Each contender runs in a process of its own for the memory figure, and interleaved with the others in one process for the
times; medians of CPU time of one thread. Writes `benchmarks/results/<name>.json` and prints the table.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_moe
from peft_moe import MoCLEConfig, MoLEConfig


RESULTS = Path(__file__).parent / "results"
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = {"num_experts": 4, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
PLAIN = {"lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
METHODS: dict[str, dict[str, Callable[[], Any]]] = {
    "mole": {
        "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=LLAMA_LINEARS, **PLAIN),
        "mole_top1": lambda: MoLEConfig(**EXPERTS, top_k=1),
        "mole_top2": lambda: MoLEConfig(**EXPERTS, top_k=2, gate_scale="prob"),
        "mole_soft": lambda: MoLEConfig(**EXPERTS, soft=True),
    },
    "mocle": {
        "lora": lambda: LoraConfig(r=16, lora_alpha=32, target_modules=["up_proj", "down_proj"], **PLAIN),
        "mocle": lambda: MoCLEConfig(**EXPERTS),
        "mocle_released": lambda: MoCLEConfig.released_code(**EXPERTS),
    },
}
CONTENDERS = sorted({name for contenders in METHODS.values() for name in contenders})
TARGETS = {"step": 1.10, "decode": 1.15, "memory": 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu_whole_model")
    parser.add_argument("--method", choices=METHODS, default="mole")
    parser.add_argument(
        "--model", default=None, help="a model folder; default: random weights in SmolLM2-135M's shape"
    )
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, default=256)
    parser.add_argument("--cells", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to measure")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    measures = {"step": step_times, "decode": decode_times, "memory": memories}
    found = {what: measures[what](options) for what in options.cells}
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
    return get_peft_model(base, METHODS[options.method][contender]())


def batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 49152, (options.batch_size, options.num_tokens))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return {**inputs, **routing(options, options.batch_size)}


def routing(options: argparse.Namespace, batch_size: int) -> dict[str, torch.Tensor]:
    """What the routers need beside the tokens; plain LoRA ignores it."""
    return {"cluster_ids": torch.arange(batch_size)} if options.method == "mocle" else {}


def train_step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model.train()
    model(**inputs).loss.backward()
    model.zero_grad()


def step_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward, one value per round."""
    inputs = batch(options)
    models = {name: build(name, options) for name in METHODS[options.method]}
    return interleave(models, lambda m: train_step(m, inputs), options.rounds)


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
            **({} if isinstance(model.active_peft_config, LoraConfig) else routing(options, 1)),
        )

    models = {name: build(name, options) for name in METHODS[options.method]}
    times = interleave(models, decode, options.rounds)
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
    for name in METHODS[options.method]:
        command = [sys.executable, __file__, "--memory_of", name, "--method", options.method]
        command += ["--batch_size", str(options.batch_size)]
        command += ["--num_tokens", str(options.num_tokens)]
        command += ["--model", options.model] if options.model else []
        command += ["--layers", str(options.layers)] if options.layers else []
        found[name] = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ]
    return found


def peak_memory(contender: str, options: argparse.Namespace) -> float:
    model, inputs = build(contender, options), batch(options)
    return mib_of(lambda: train_step(model, inputs))


def mib_of(run: Callable[[], object]) -> float:
    """The most that this process holds while `run` runs twice, beyond what it holds now."""
    # the peak begins anew; ru_maxrss would hold that of building, and that of the process which started this one
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    for _ in range(2):
        run()
    return status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    """What Linux says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    units = {"step": "s", "decode": "s/token", "memory": "MiB"}
    print(f"{'':<10}{'':<8}" + "".join(f"{name:>22}" for name in next(iter(found.values()))) + f"{'target':>9}")
    for what, cells in found.items():
        lora = statistics.median(cells["lora"])
        row = "".join(
            f"{statistics.median(cells[name]):>14.3f} ({statistics.median(cells[name]) / lora:.2f}x)" for name in cells
        )
        print(f"{what:<10}{units[what]:<8}{row}{TARGETS[what]:>8.2f}x")


if __name__ == "__main__":
    main()
