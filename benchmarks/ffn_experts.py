"""Times FFN experts against a dense MLP of the same work, alone and inside a whole MoeLlava.

    OMP_NUM_THREADS=1 python benchmarks/ffn_experts.py --name cpu_ffn_experts
    python benchmarks/ffn_experts.py --device cuda --name cuda_ffn_experts

Contenders: the dense MLP, K times as wide; every implementation of transformers' experts interface that runs here,
ours among them; and `modules`, the structure of the original: one module per expert, tokens dispatched and combined by
einsum (as DeepSpeed-MoE does, without dropping). In the whole model the dense contender is a LLaVA whose MLPs are K
times as wide, so that it has the same active parameters.

One process, contenders interleaved round by round, median; the clocks are those of `timing.py`. Outputs and gradients
are compared with `eager` before any time is printed. `benchmarks/results/<name>.json` is written after each cell.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from environment import command, hardware, state, versions
from report import geomean
from result_file import add_arguments, write
from timing import Clock, clock_of, drop_failing, interleaved, iqrs, medians
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from peft_moe import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava.experts import MoeLlavaGatedExperts


# peft_moe hands on to grouped_mm
IMPLEMENTATIONS = [
    "eager",
    "modules",
    "batched_mm",
    "grouped_mm",
    "sonicmoe",
    "deepgemm",
    "peft_moe",
    "peft_moe_triton",
]
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
# in the order of importance: Mixtral's experts, fine-grained ones, decoding
CUDA_SHAPES = [
    (4096, 14336, 8, 2, 4096),
    (2048, 1024, 64, 8, 4096),
    (4096, 14336, 8, 2, 1),
    (2048, 1024, 64, 8, 1),
    (2048, 5632, 4, 2, 4096),
    (4096, 14336, 8, 2, 64),
]
QUICK_SHAPES = [(64, 128, 4, 2, 64), (64, 128, 4, 2, 1)]
FULL = [
    *SHAPES,
    *((1024, 2816, 4, k, 4096) for k in (1, 2)),
    *((2048, 5632, 4, k, 1024) for k in (1, 2)),
    (1024, 2816, 8, 2, 2048),
]
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TARGETS = [
    ("a step, E = 4, T >= 1024, over the dense MLP", 1.10, lambda s: s["E"] == 4 and s["T"] >= 1024),
    ("a step, E = 8, T >= 1024, over the dense MLP", 1.05, lambda s: s["E"] == 8 and s["T"] >= 1024),
]
# batched_mm copies the weights of every token; modules multiplies with a mask of T·K·E·capacity elements
MAX_BATCHED_TOKENS = 8
MAX_MODULES = 8
SIZES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "text": {
            "hidden_size": 576,
            "num_hidden_layers": 6,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 8192,
        },
        "intermediate_size": 1536,
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        "batch_size": 4,
        "num_tokens": 256,
    },
    # TinyLlama-1.1B and CLIP-L/14 at 336 pixels
    "llama_1b": {
        "text": {
            "hidden_size": 2048,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32001,
        },
        "intermediate_size": 5632,
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "batch_size": 4,
        "num_tokens": 1024,
    },
    "tiny": {
        "text": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 64,
        },
        "intermediate_size": 64,
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "batch_size": 2,
        "num_tokens": 16,
    },
}


class Settings:
    """What a module of experts reads from its configuration."""

    _experts_implementation = "eager"


def modules_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Dispatch by einsum into one buffer per expert, run expert after expert, combine by einsum."""
    choices = F.one_hot(top_k_index.flatten(), self.num_experts)  # (T·K, E)
    rows = torch.arange(choices.shape[0], device=choices.device)
    place = (choices.cumsum(0) - 1)[rows, top_k_index.flatten()]
    capacity = int(choices.sum(0).max())
    where = hidden_states.new_zeros(*top_k_index.shape, self.num_experts, capacity)
    where = where.view(-1, self.num_experts, capacity)
    where[rows, top_k_index.flatten(), place] = 1
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


def layer_contenders(
    D: int, num_inner: int, E: int, K: int, T: int, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Name → one step (for T = 1, one forward pass); it returns what is compared."""
    torch.manual_seed(0)
    with torch.device(device):
        experts = MoeLlavaGatedExperts(Settings(), E, D, num_inner, nn.SiLU())
        experts.reset_parameters(0.02)
        experts, dense = experts.to(dtype), DenseMlp(D, K * num_inner).to(dtype)
        x, weights = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.rand(T, K, requires_grad=True)
        index, grad = torch.multinomial(torch.ones(T, E), K), torch.randn(T, D, dtype=dtype)
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
        is_too_large = {"batched_mm": T > MAX_BATCHED_TOKENS, "modules": E > MAX_MODULES and device == "cuda"}
        if not is_too_large.get(name):
            found[name] = of_implementation(name)
    return found


def check(contenders: dict[str, Callable[[], Any]], limit: float) -> dict[str, float]:
    """Largest relative Frobenius error of output and gradients against `eager`; exits above the limit."""
    expected, errors = contenders["eager"](), {}
    for name, run in contenders.items():
        if name not in ("dense", "eager"):
            pairs = zip(run(), expected, strict=True)
            errors[name] = max(
                float((f.float() - e.float()).norm() / e.float().norm().clamp_min(1e-30)) for f, e in pairs
            )
            if not errors[name] <= limit:
                sys.exit(f"{name} differs from eager by {errors[name]:.1e}: no time is worth printing.")
    return errors


def models(size: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A LLaVA whose MLPs are as wide as two experts, and a MoeLlava of four experts of which each token uses two."""
    image_token = size["text"]["vocab_size"] - 1
    fields = {
        "image_token_index": image_token,
        "image_seq_length": (size["vision"]["image_size"] // size["vision"]["patch_size"]) ** 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
    }

    def text(intermediate_size: int) -> LlamaConfig:
        return LlamaConfig(**size["text"], intermediate_size=intermediate_size, tie_word_embeddings=True)

    vision = CLIPVisionConfig(**size["vision"])
    torch.manual_seed(0)
    with torch.device(device):
        dense = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text(2 * size["intermediate_size"]), **fields)
        )
        sparse = MoeLlavaForConditionalGeneration(
            MoeLlavaConfig(
                vision_config=vision,
                text_config=text(size["intermediate_size"]),
                num_experts=4,
                num_experts_per_tok=2,
                moe_layers="all",
                **fields,
            )
        )
    return dense.to(dtype), sparse.to(dtype)


def whole_models(options: argparse.Namespace, clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """Step and decode of a whole LLaVA: dense, and sparse with every implementation; memory of a step."""
    size = {**SIZES[options.size], "text": {**SIZES[options.size]["text"]}}
    if options.layers:
        size["text"]["num_hidden_layers"] = options.layers
    dense, sparse = models(size, options.device, dtype)
    num_images, image_size = dense.config.image_seq_length, size["vision"]["image_size"]
    image_token = dense.config.image_token_index
    shape = (size["batch_size"], size["num_tokens"])
    tokens = torch.randint(0, image_token, shape, device=options.device)
    tokens[:, :num_images] = image_token
    pixels = torch.rand(shape[0], 3, image_size, image_size, device=options.device).to(dtype)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    labels = tokens.masked_fill(tokens == image_token, -100)

    def step(model: nn.Module, implementation: str | None) -> Callable[[], Any]:
        def run() -> None:
            if implementation:
                model.set_experts_implementation(implementation)
            model.train()
            model(**batch, labels=labels).loss.backward()
            model.zero_grad()

        return run

    def decode(model: nn.Module, implementation: str | None) -> Callable[[], Any]:
        prompt = {name: batch[name][:1, : num_images + 8] for name in ("input_ids", "attention_mask")}
        prompt["pixel_values"] = pixels[:1]

        def run() -> None:
            if implementation:
                model.set_experts_implementation(implementation)
            model.eval()
            model.generate(**prompt, min_new_tokens=16, max_new_tokens=16, do_sample=False, pad_token_id=0)

        return run

    found: dict[str, Any] = {"size": size, "tokens_per_step": tokens.numel(), "unusable": {}}
    for what, make in (("step", step), ("answer of 16 tokens", decode)):
        contenders = {"dense": make(dense, None)}
        contenders |= {
            name: make(sparse, name) for name in IMPLEMENTATIONS if not (what == "step" and name == "batched_mm")
        }
        found["unusable"] |= drop_failing(contenders, clock)
        found[what] = medians(interleaved(contenders, clock, options.rounds))
        if what == "step":
            found["peak_mib"] = {name: round(clock.peak_mib(run), 1) for name, run in contenders.items()}
            found["tokens_per_s"] = {name: tokens.numel() / ms * 1e3 for name, ms in found[what].items()}
    return found


def print_table(result: dict[str, Any]) -> None:
    """Time over the dense contender, cell by cell, then geometric means against the targets."""
    names = [name for name in IMPLEMENTATIONS if any(name in cell["median_ms"] for cell in result["cells"])]
    print(f"{'time / dense MLP':<34}{'dense ms':>10}" + "".join(f"{name:>16}" for name in names))
    for cell in result["cells"]:
        times, shape = cell["median_ms"], cell["shape"]
        label = " ".join(f"{axis}{size}" for axis, size in shape.items())
        row = "".join(f"{times[n] / times['dense']:>16.2f}" if n in times else f"{'-':>16}" for n in names)
        print(f"{label:<34}{times['dense']:>10.2f}{row}")
    for what in ("step", "answer of 16 tokens", "peak_mib"):
        cells = result.get("whole_model", {}).get(what)
        if cells:
            row = "".join(f"{cells[n] / cells['dense']:>16.2f}" if n in cells else f"{'-':>16}" for n in names)
            print(f"{'MoeLlava, ' + what:<34}{cells['dense']:>10.2f}{row}")
    targets = TARGETS if result["hardware"]["device"] == "cpu" else []
    for what, limit, belongs in targets:
        cells = [cell["median_ms"] for cell in result["cells"] if belongs(cell["shape"])]
        if not cells:
            continue
        means = {
            name: geomean([c[name] / c["dense"] for c in cells]) for name in names if all(name in c for c in cells)
        }
        verdict = "met" if means["peft_moe"] <= limit else "MISSED"
        shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        print(f"{what}: {shown}; target for peft_moe <= {limit:.2f} {verdict}")
    for ours in ("peft_moe", "peft_moe_triton"):
        pairs = [cell["median_ms"] for cell in result["cells"] if {ours, "grouped_mm"} <= set(cell["median_ms"])]
        if pairs:
            value = geomean([times["grouped_mm"] / times[ours] for times in pairs])
            print(f"grouped_mm over {ours}, all {len(pairs)} shapes: {value:.2f}; target on CUDA >= 1.00")
    for name, reason in result["unusable"].items():
        print(f"not run: {name}, {reason}")


def run_cells(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Add cell after cell while there is time, then the whole models; write after each."""
    clock, dtype, started = clock_of(options.device), getattr(torch, options.dtype), time.monotonic()
    result |= {"clock": clock.description, "state": state(options.device)}
    shapes = CUDA_SHAPES if options.device == "cuda" else FULL if options.full else SHAPES
    for D, num_inner, E, K, T in QUICK_SHAPES if options.quick else shapes:
        shape = {"D": D, "F": num_inner, "E": E, "K": K, "T": T}
        if time.monotonic() - started > options.total_seconds / 2:  # the other half is for the whole models
            result.setdefault("not_reached", []).append(shape)
            continue
        contenders = layer_contenders(D, num_inner, E, K, T, options.device, dtype)
        result["unusable"] |= drop_failing(contenders, clock)
        errors = check(contenders, LIMIT[dtype])
        times = interleaved(contenders, clock, options.rounds, dict.fromkeys(contenders, 1 if T > 64 else 20))
        result["cells"].append(
            {"shape": shape, "errors": errors, "median_ms": medians(times), "iqr_ms": iqrs(times)}
            | {"peak_mib": {name: round(clock.peak_mib(run), 1) for name, run in contenders.items()}}
        )
        write(result, options)
        print(".", end="", flush=True, file=sys.stderr)
    result["whole_model"] = whole_models(options, clock, dtype)
    write(result, options)


def parse() -> argparse.Namespace:
    """Options; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "cpu_ffn_experts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, help="of the whole models; default: smollm2, on CUDA llama_1b")
    parser.add_argument("--layers", type=int, help="of the whole models, if not those of the size")
    parser.add_argument("--full", action="store_true", help="larger shapes too (CPU)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and models: whether everything runs")
    parser.add_argument("--total_seconds", type=float, default=float("inf"), help="half of it for single layers")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    options.size = options.size or ("tiny" if options.quick else "llama_1b" if on_cuda else "smollm2")
    return options


def main() -> None:
    """Run the cells and the whole models, write them, print the table."""
    options = parse()
    torch.set_num_threads(1)
    ExpertsInterface.register("modules", modules_forward)
    result: dict[str, Any] = {
        "benchmark": "ffn_experts",
        "command": command(),
        "dtype": options.dtype,
        "threads": 1,
        "rounds": options.rounds,
        "hardware": hardware(options.device),
        "versions": versions(),
        "experts_implementations": sorted(ALL_EXPERTS_FUNCTIONS.valid_keys()),
        "unusable": {},
        "cells": [],
    }
    run_cells(result, options)
    print_table(result)


if __name__ == "__main__":
    main()
