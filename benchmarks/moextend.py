"""What new experts cost: inference beside the base model, training beside full fine-tuning and LoRA.

    OMP_NUM_THREADS=1 python benchmarks/moextend.py --name cpu_moextend
    OMP_NUM_THREADS=1 python benchmarks/moextend.py --name cpu_moextend_olmoe --shape olmoe --layers 2

A Mixtral with random weights, `small` (D 512, F 1024, E 8, K 2, six layers) or in the shape of OLMoE-1B-7B's layers (D
2048, F 1024, E 64, K 8), which is for inference only. Inference: each layer has a new expert that no token chooses
(`copy_guarded`), so that the work is that of the base model; 1024 tokens at once, and greedy decoding with a cache.
`base again` is a second copy of the base model: how far its ratio is from 1 is the noise. Training: forward, backward
and a step of AdamW, of all parameters (`full`), of LoRA of rank 16 on attention, and of one new expert that is a copy,
in every layer (`all layers`) and in every other one (`half`; paper).

One process, contenders interleaved, CPU time of one thread, median. Memory: MiB that training needs beyond the loaded
model, gradients and optimizer among them, one process per contender. Writes `benchmarks/results/<name>.json`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from environment import command, hardware, versions
from peft import LoraConfig, get_peft_model
from process_memory import mib_of
from result_file import add_arguments, settings, write
from timing import CpuClock, interleaved, iqrs, medians
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from peft_moe import MoExtendConfig


INFERENCE = ("base", "base again", "moextend")
TRAINING = ("full", "lora", "moextend, half", "moextend, all layers")
SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"hidden_size": 2048, "intermediate_size": 1024, "num_local_experts": 64, "num_experts_per_tok": 8},
}
VOCABULARY = 8192
NUM_NEW_TOKENS = 16
TARGET = 1.05


def base(options: argparse.Namespace) -> nn.Module:
    """Always with the same weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SHAPES[options.shape],
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    return MixtralForCausalLM(config)


def build(contender: str, options: argparse.Namespace) -> nn.Module:
    """The model of a contender."""
    model = base(options)
    if contender.startswith("base") or contender == "full":
        return model
    if contender == "lora":
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=attention, task_type="CAUSAL_LM"))
    layers = list(range(0, options.layers, 2 if contender.endswith("half") else 1))
    init = "copy_guarded" if contender in INFERENCE else "copy"
    config = MoExtendConfig(layers=layers, copy_sources=dict.fromkeys(layers, 0), init=init, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def prefill(model: nn.Module, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """One pass over a prompt."""
    prompt = torch.randint(0, VOCABULARY, (1, options.num_tokens), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits

    model.eval()
    return run


def decode(model: nn.Module) -> Callable[[], torch.Tensor]:
    """Sixteen tokens after a prompt of sixteen."""
    prompt = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    settings = {"min_new_tokens": NUM_NEW_TOKENS, "max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}

    def run() -> torch.Tensor:
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **settings)

    model.eval()
    return run


def training_step(model: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and a step of the optimizer."""
    tokens = torch.randint(
        0, VOCABULARY, (options.batch_size, options.num_tokens // 4), generator=torch.Generator().manual_seed(2)
    )
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return run


def inference_times(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a prefill and of a decoded token; exits where outputs differ.

    Where a model lies in memory is worth up to a tenth, so each is built several times, in turning order.
    """
    found: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in INFERENCE} for what in ("prefill", "decode")
    }
    for turn in range(options.builds):
        first = turn % len(INFERENCE)
        models = {name: build(name, options) for name in INFERENCE[first:] + INFERENCE[:first]}
        for what, runs in (
            ("prefill", {name: prefill(model, options) for name, model in models.items()}),
            ("decode", {name: decode(model) for name, model in models.items()}),
        ):
            expected = runs["base"]()
            for name, run in runs.items():
                if not torch.allclose(run().float(), expected.float(), rtol=1e-4, atol=1e-5):
                    sys.exit(f"{name} differs from the base model in {what}: no time is worth printing.")
            for name, times in interleaved(runs, CpuClock(), options.rounds).items():
                found[what][name] += [ms / (NUM_NEW_TOKENS if what == "decode" else 1) for ms in times]
    return found


def training_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of a training step."""
    runs = {name: training_step(build(name, options), options) for name in TRAINING}
    return interleaved(runs, CpuClock(), options.rounds)


def memories(options: argparse.Namespace) -> dict[str, float]:
    """MiB that training needs beyond the loaded model."""
    found = {}
    for name in TRAINING:
        command = [sys.executable, __file__, "--memory_of", name, "--layers", str(options.layers)]
        command += ["--batch_size", str(options.batch_size), "--num_tokens", str(options.num_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = float(output.split()[-1])
    return found


def peak_memory(contender: str, options: argparse.Namespace) -> float:
    """Of this process, in MiB."""
    return mib_of(training_step(build(contender, options), options))


def trainable(options: argparse.Namespace) -> dict[str, int]:
    """How many parameters each contender trains."""
    return {name: sum(p.numel() for p in build(name, options).parameters() if p.requires_grad) for name in TRAINING}


def print_table(result: dict[str, Any]) -> None:
    """Medians, and ratios to the first contender of each line."""
    units = {"prefill": "ms", "decode": "ms/token", "step": "ms", "memory": "MiB"}
    for what, cells in result["median"].items():
        first = next(iter(cells.values()))
        row = ", ".join(f"{name} {value:.1f} ({value / first:.3f}x)" for name, value in cells.items())
        print(f"{what} [{units[what]}]: {row}")
    for what in ("prefill", "decode"):
        ratio = result["median"][what]["moextend"] / result["median"][what]["base"]
        print(
            f"{what} with an idle new expert: {ratio:.3f}, target <= {TARGET} {'met' if ratio <= TARGET else 'MISSED'}"
        )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "cpu_moextend")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--builds", type=int, default=6, help="of the models for inference, with `rounds` each")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, default=1024, help="of a prompt; a training row has a quarter of it")
    parser.add_argument("--memory_of", choices=TRAINING, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.memory_of:
        print(peak_memory(options.memory_of, options))
        return
    times = inference_times(options)
    if options.shape == "small":
        times["step"] = training_times(options)
    result = {
        "benchmark": "moextend",
        "command": command(),
        "dtype": "float32",
        "threads": 1,
        "clock": CpuClock.description,
        "rounds": options.rounds,
        "settings": settings(options, "memory_of"),
        "hardware": hardware(),
        "versions": versions(),
        "target": TARGET,
        "trainable_parameters": trainable(options) if options.shape == "small" else None,
        "median": {what: medians(cells) for what, cells in times.items()},
        "iqr": {what: iqrs(cells) for what, cells in times.items()},
    }
    if options.shape == "small":
        result["median"]["memory"] = memories(options)
    write(result, options)
    print_table(result)


if __name__ == "__main__":
    main()
