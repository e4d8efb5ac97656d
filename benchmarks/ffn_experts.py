"""Times FFN experts against a dense MLP of the same work, alone and inside a whole MoeLlava.

    OMP_NUM_THREADS=1 python benchmarks/ffn_experts.py --name cpu_ffn_experts

Contenders: the dense MLP, K times as wide; every implementation of transformers' experts interface that runs here, ours
among them; and `modules`, the structure of the original: one module per expert, tokens dispatched and combined by einsum
(as DeepSpeed-MoE does, without dropping). In the whole model the dense contender is a LLaVA whose MLPs are K times as
wide, so that it has the same active parameters.

One process, contenders interleaved round by round, CPU time of the thread, median. Outputs and gradients are compared
with `eager` before any time is printed. Writes `benchmarks/results/<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from lora_experts import hardware, iqr, versions
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from peft_moe import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava.experts import MoeLlavaGatedExperts


RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = ["eager", "modules", "batched_mm", "grouped_mm", "sonicmoe", "deepgemm", "peft_moe"]
# D, F, E, K, T; decoding is T = 1 without gradients
SHAPES = [
    *((576, 1536, 4, k, t) for k in (1, 2) for t in (1024, 4096)),
    *((1024, 2816, 4, k, 1024) for k in (1, 2)),
    *((576, 1536, 8, 2, t) for t in (1024, 4096)),
    (512, 256, 32, 4, 2048),
    (576, 1536, 4, 2, 64),
    (576, 1536, 4, 2, 1),
    (1024, 2816, 8, 2, 1),
]
FULL = [
    *SHAPES,
    *((1024, 2816, 4, k, 4096) for k in (1, 2)),
    *((2048, 5632, 4, k, 1024) for k in (1, 2)),
    (1024, 2816, 8, 2, 2048),
]
TARGETS = [
    ("a step, E = 4, T >= 1024, over the dense MLP", 1.10, lambda s: s["E"] == 4 and s["T"] >= 1024),
    ("a step, E = 8, T >= 1024, over the dense MLP", 1.05, lambda s: s["E"] == 8 and s["T"] >= 1024),
]
# batched_mm copies the weights of every token
MAX_BATCHED_TOKENS = 8


class Settings:
    """What a module of experts reads from its configuration."""

    _experts_implementation = "eager"


def modules_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Dispatch by einsum into one buffer per expert, run expert after expert, combine by einsum."""
    choices = F.one_hot(top_k_index.flatten(), self.num_experts)  # (T·K, E)
    place = (choices.cumsum(0) - 1)[torch.arange(choices.shape[0]), top_k_index.flatten()]
    capacity = int(choices.sum(0).max())
    where = torch.zeros(*top_k_index.shape, self.num_experts, capacity, dtype=hidden_states.dtype)
    where = where.view(-1, self.num_experts, capacity)
    where[torch.arange(where.shape[0]), top_k_index.flatten(), place] = 1
    where = where.view(*top_k_index.shape, self.num_experts, capacity)  # (T, K, E, C)
    dispatched = torch.einsum("tkec,td->ecd", where, hidden_states)
    done = torch.stack([self._one(expert, rows) for expert, rows in enumerate(dispatched)])
    return torch.einsum("tkec,tk,ecd->td", where, top_k_weights.to(where.dtype), done)


class DenseMlp(nn.Module):
    """Gate, up and down."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(T, D)` → `(T, D)`."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def layer_contenders(D: int, num_inner: int, E: int, K: int, T: int) -> dict[str, Callable[[], Any]]:
    """Name → one step (for T = 1, one forward pass); it returns what is compared."""
    torch.manual_seed(0)
    experts = MoeLlavaGatedExperts(Settings(), E, D, num_inner, nn.SiLU())
    experts.reset_parameters(0.02)
    dense = DenseMlp(D, K * num_inner)
    x, weights = torch.randn(T, D, requires_grad=True), torch.rand(T, K, requires_grad=True)
    index, grad = torch.multinomial(torch.ones(T, E), K), torch.randn(T, D)
    is_decode = T == 1

    def run(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.set_grad_enabled(not is_decode):
            out = function()
        return [out] if is_decode else [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def of_implementation(name: str) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            experts.config._experts_implementation = name
            return experts(x, index, weights)

        return lambda: run(call, [x, weights, *experts.parameters()])

    found = {"dense": lambda: run(lambda: dense(x), [x, *dense.parameters()])}
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or T <= MAX_BATCHED_TOKENS:
            found[name] = of_implementation(name)
    return found


def without_unusable(contenders: dict[str, Callable[[], Any]], unusable: dict[str, str]) -> None:
    """Drop what raises here, and remember why."""
    for name in list(contenders):
        try:
            contenders[name]()
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            unusable[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del contenders[name]


def check(contenders: dict[str, Callable[[], Any]], limit: float = 1e-4) -> dict[str, float]:
    """Largest relative Frobenius error of output and gradients against `eager`; exits above the limit."""
    expected, errors = contenders["eager"](), {}
    for name, run in contenders.items():
        if name not in ("dense", "eager"):
            pairs = zip(run(), expected, strict=True)
            errors[name] = max(float((f - e).norm() / e.norm().clamp_min(1e-30)) for f, e in pairs)
            if errors[name] > limit:
                sys.exit(f"{name} differs from eager by {errors[name]:.1e}: no time is worth printing.")
    return errors


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Milliseconds of thread CPU time per call; the order alternates."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name in list(contenders) if round_number % 2 else list(reversed(contenders)):
            start = time.thread_time()
            for _ in range(calls):
                contenders[name]()
            if round_number:
                times[name].append((time.thread_time() - start) / calls * 1e3)
    return times


def whole_models(options: argparse.Namespace) -> dict[str, Any]:
    """Step and decode of a whole LLaVA: dense, and sparse with every implementation."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    text = {
        "hidden_size": 576,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    }
    fields = {
        "vision_config": vision,
        "image_token_index": 8191,
        "image_seq_length": 16,
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
    }
    dense = LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**text, intermediate_size=2 * 1536), **fields)
    )
    sparse = MoeLlavaForConditionalGeneration(
        MoeLlavaConfig(
            text_config=LlamaConfig(**text, intermediate_size=1536),
            num_experts=4,
            num_experts_per_tok=2,
            moe_layers="all",
            **fields,
        )
    )
    tokens = torch.randint(0, 8000, (4, 256))
    tokens[:, :16] = 8191
    pixels = torch.rand(4, 3, 64, 64)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    labels = tokens.masked_fill(tokens == 8191, -100)

    def step(model: nn.Module, implementation: str | None) -> Callable[[], Any]:
        def run() -> None:
            if implementation:
                model.set_experts_implementation(implementation)
            model.train()
            model(**batch, labels=labels).loss.backward()
            model.zero_grad()

        return run

    def decode(model: nn.Module, implementation: str | None) -> Callable[[], Any]:
        def run() -> None:
            if implementation:
                model.set_experts_implementation(implementation)
            model.eval()
            prompt = {**{n: batch[n][:1, :24] for n in ("input_ids", "attention_mask")}, "pixel_values": pixels[:1]}
            model.generate(**prompt, min_new_tokens=16, max_new_tokens=16, do_sample=False, pad_token_id=0)

        return run

    found: dict[str, Any] = {"unusable": {}}
    for what, make in (("step", step), ("answer of 16 tokens", decode)):
        contenders = {"dense": make(dense, None)}
        contenders |= {
            name: make(sparse, name) for name in IMPLEMENTATIONS if not (what == "step" and name == "batched_mm")
        }
        without_unusable(contenders, found["unusable"])
        times = interleaved(contenders, options.rounds)
        found[what] = {name: statistics.median(values) for name, values in times.items()}
    return found


def print_table(result: dict[str, Any]) -> None:
    """Time over the dense contender, cell by cell, then geometric means against the targets."""
    names = [name for name in IMPLEMENTATIONS if any(name in cell["median_ms"] for cell in result["cells"])]
    print(f"{'time / dense MLP':<34}{'dense ms':>10}" + "".join(f"{name:>12}" for name in names))
    for cell in result["cells"]:
        times, shape = cell["median_ms"], cell["shape"]
        label = " ".join(f"{axis}{size}" for axis, size in shape.items())
        row = "".join(f"{times[n] / times['dense']:>12.2f}" if n in times else f"{'-':>12}" for n in names)
        print(f"{label:<34}{times['dense']:>10.2f}{row}")
    for what, cells in result["whole_model"].items():
        if what != "unusable":
            row = "".join(f"{cells[n] / cells['dense']:>12.2f}" if n in cells else f"{'-':>12}" for n in names)
            print(f"{'MoeLlava, ' + what:<34}{cells['dense']:>10.2f}{row}")
    for what, limit, belongs in TARGETS:
        cells = [cell["median_ms"] for cell in result["cells"] if belongs(cell["shape"])]
        if not cells:
            continue
        means = {
            name: exp(sum(log(c[name] / c["dense"]) for c in cells) / len(cells))
            for name in names
            if all(name in c for c in cells)
        }
        verdict = "met" if means["peft_moe"] <= limit else "MISSED"
        shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        print(f"{what}: {shown}; target for peft_moe <= {limit:.2f} {verdict}")
    for name, reason in result["unusable"].items():
        print(f"not run: {name}, {reason}")


def main() -> None:
    """Run the cells and the whole models, write them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu_ffn_experts", help="name of the result file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6, help="of the whole models")
    parser.add_argument("--full", action="store_true", help="larger shapes too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ExpertsInterface.register("modules", modules_forward)
    unusable: dict[str, str] = {}
    cells = []
    for D, num_inner, E, K, T in FULL if options.full else SHAPES:
        contenders = layer_contenders(D, num_inner, E, K, T)
        without_unusable(contenders, unusable)
        errors = check(contenders)
        times = interleaved(contenders, options.rounds, calls=1 if T > 64 else 20)
        cells.append(
            {
                "shape": {"D": D, "F": num_inner, "E": E, "K": K, "T": T},
                "errors": errors,
                "median_ms": {name: statistics.median(values) for name, values in times.items()},
                "iqr_ms": {name: iqr(values) for name, values in times.items()},
            }
        )
        print(".", end="", flush=True, file=sys.stderr)
    result = {
        "benchmark": "ffn_experts",
        "command": "python benchmarks/ffn_experts.py " + " ".join(sys.argv[1:]),
        "dtype": "float32",
        "threads": 1,
        "clock": "time.thread_time",
        "rounds": options.rounds,
        "hardware": hardware(),
        "versions": {**versions(), "transformers": transformers.__version__},
        "experts_implementations": sorted(ALL_EXPERTS_FUNCTIONS.valid_keys()),
        "unusable": unusable,
        "cells": cells,
        "whole_model": whole_models(options),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)


if __name__ == "__main__":
    main()
