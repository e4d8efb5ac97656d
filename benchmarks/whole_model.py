"""A whole language model with MoLE or MoCLE beside plain LoRA on the same linears: step, decode, memory.

    python benchmarks/whole_model.py --name cpu_whole_model
    python benchmarks/whole_model.py --method mocle --name cpu_whole_model_mocle
    python benchmarks/whole_model.py --device cuda --name cuda_whole_model

LoRA has the rank of one expert of MoLE; for MoCLE the rank that is active for an example, expert and universal expert.
A step is forward and backward, with `--optimizer` that of AdamW too.

Contenders are interleaved in one process for the times; medians, by the clocks of `timing.py`. The memory figure is
what a step needs beyond the loaded model: on a CPU in a process of its own, on CUDA as the allocator counts it.
`benchmarks/results/<name>.json` is written after each part; the table comes last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import command, hardware, state, versions
from peft import LoraConfig, get_peft_model
from process_memory import mib_of
from result_file import add_arguments, settings, write
from timing import clock_of, interleaved
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_moe import MoCLEConfig, MoLEConfig


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
UNITS = {"step": "s", "decode": "s/token", "memory": "MiB"}
NUM_NEW_TOKENS = 16

# shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.2-3B
SIZES = {
    "smollm2_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama_1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama_3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}


def parse() -> argparse.Namespace:
    """Options; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "cpu_whole_model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--method", choices=METHODS, default="mole")
    parser.add_argument("--model", default=None, help="a model folder; default: random weights")
    parser.add_argument("--size", choices=SIZES, help="of random weights; default: smollm2_135m, on CUDA llama_1b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether everything runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, help="of each row; default 256, on CUDA 1024")
    parser.add_argument("--optimizer", action="store_true", help="a step includes one of AdamW")
    parser.add_argument("--cells", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to measure")
    parser.add_argument("--total_seconds", type=float, default=float("inf"), help="no part begins after that")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    options.size = options.size or ("tiny" if options.quick else "llama_1b" if on_cuda else "smollm2_135m")
    options.num_tokens = options.num_tokens or (1024 if on_cuda else 16 if options.quick else 256)
    return options


def main() -> None:
    """Measure part after part, write, print the table."""
    options = parse()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    measures = {"step": step_times, "decode": decode_times, "memory": memories}
    result: dict[str, Any] = {
        "benchmark": "whole_model",
        "command": command(),
        "dtype": options.dtype,
        "threads": 1,
        "hardware": hardware(options.device),
        "state": state(options.device),
        "versions": versions(),
        "settings": settings(options, "memory_of", "total_seconds"),
        "targets": TARGETS,
        "cells": {},
    }
    started = time.monotonic()
    for what in options.cells:
        if time.monotonic() - started > options.total_seconds:
            result.setdefault("not_reached", []).append(what)
            continue
        result["cells"][what] = measures[what](options)
        if what == "step":
            result["tokens_per_s"] = {
                name: options.batch_size * options.num_tokens / statistics.median(seconds)
                for name, seconds in result["cells"][what].items()
            }
        write(result, options)
    write(result, options)
    print_table(result)


def build(contender: str, options: argparse.Namespace) -> Any:
    """The model of a contender, on its device; always the same base weights."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)
    else:
        size = {**SIZES[options.size], "tie_word_embeddings": True}
        if options.layers:
            size["num_hidden_layers"] = options.layers
        with torch.device(options.device):
            base = LlamaForCausalLM(LlamaConfig(**size))
        base = base.to(dtype)
    return get_peft_model(base, METHODS[options.method][contender]())


def build_all(options: argparse.Namespace) -> dict[str, Any]:
    """The models of all contenders."""
    return {name: build(name, options) for name in METHODS[options.method]}


def random_tokens(options: argparse.Namespace, num_rows: int, num_tokens: int) -> torch.Tensor:
    """`(num_rows, num_tokens)`; below 49152, the vocabulary of the models that this benchmark began with."""
    return torch.randint(0, min(49152, SIZES[options.size]["vocab_size"]), (num_rows, num_tokens)).to(options.device)


def batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Inputs of a training step."""
    tokens = random_tokens(options, options.batch_size, options.num_tokens)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return {**inputs, **routing(options, options.batch_size)}


def routing(options: argparse.Namespace, batch_size: int) -> dict[str, torch.Tensor]:
    """What the routers need beside the tokens; plain LoRA ignores it."""
    return {"cluster_ids": torch.arange(batch_size, device=options.device)} if options.method == "mocle" else {}


def train_step(model: Any, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward, and the optimizer's step if it is asked for."""
    inputs = batch(options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if options.optimizer else None

    def run() -> None:
        model.train()
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return run


def step_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a training step, one value per round."""
    runs = {name: train_step(model, options) for name, model in build_all(options).items()}
    return seconds(interleaved(runs, clock_of(options.device), options.rounds))


def decode_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per token of greedy decoding with a key-value cache, after a prompt of 16 tokens."""
    prompt = random_tokens(options, 1, 16)

    def decode(model: Any) -> Callable[[], None]:
        extra = {} if isinstance(model.active_peft_config, LoraConfig) else routing(options, 1)
        length = {"min_new_tokens": NUM_NEW_TOKENS, "max_new_tokens": NUM_NEW_TOKENS}

        def run() -> None:
            model.eval()
            model.generate(input_ids=prompt, do_sample=False, pad_token_id=0, **length, **extra)

        return run

    runs = {name: decode(model) for name, model in build_all(options).items()}
    times = interleaved(runs, clock_of(options.device), options.rounds)
    return {name: [value / NUM_NEW_TOKENS for value in found] for name, found in seconds(times).items()}


def seconds(times_ms: dict[str, list[float]]) -> dict[str, list[float]]:
    """Milliseconds → seconds."""
    return {name: [value / 1e3 for value in values] for name, values in times_ms.items()}


def memories(options: argparse.Namespace) -> dict[str, list[float]]:
    """MiB that a training step needs beyond the loaded model."""
    measured = peak_memory if options.device == "cuda" else peak_memory_of_a_process
    return {name: [measured(name, options)] for name in METHODS[options.method]}


def peak_memory_of_a_process(contender: str, options: argparse.Namespace) -> float:
    """[`peak_memory`] in a process of its own."""
    passed = ("method", "batch_size", "num_tokens", "model", "size", "layers", "dtype")
    command = [sys.executable, __file__, "--memory_of", contender, *(["--optimizer"] if options.optimizer else [])]
    for name in passed:
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(found.split()[-1]))


def peak_memory(contender: str, options: argparse.Namespace) -> float:
    """Of this process; on CUDA of a second step, when the optimizer has its state."""
    run = train_step(build(contender, options), options)
    if options.device == "cpu":
        return mib_of(run)
    run()
    return clock_of(options.device).peak_mib(run)


def print_table(result: dict[str, Any]) -> None:
    """Medians, and ratios to LoRA."""
    found = result["cells"]
    for what in result.get("not_reached", []):
        print(f"not reached: {what}")
    if not found:
        return
    print(f"{'':<10}{'':<8}" + "".join(f"{name:>22}" for name in next(iter(found.values()))) + f"{'target':>9}")
    for what, cells in found.items():
        lora = statistics.median(cells["lora"])
        row = "".join(
            f"{statistics.median(cells[name]):>14.3f} ({statistics.median(cells[name]) / lora:.2f}x)" for name in cells
        )
        print(f"{what:<10}{UNITS[what]:<8}{row}{TARGETS[what]:>8.2f}x")
    if "tokens_per_s" in result:
        print(f"{'step':<10}{'tok/s':<8}" + "".join(f"{value:>22.0f}" for value in result["tokens_per_s"].values()))


if __name__ == "__main__":
    main()
