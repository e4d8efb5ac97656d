"""What the benchmark compares. Each contender is a whole layer: a frozen `nn.Linear` and its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Shape
from torch import nn

from peft_moe.kernels import BACKENDS, DispatchPlan, explain, lora_experts


Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Problem:
    """Tensors of one cell, the same for every contender."""

    shape: Shape
    dtype: torch.dtype
    base: nn.Linear
    hidden_states: torch.Tensor
    A: nn.Parameter
    B: nn.Parameter
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    grad_out: torch.Tensor
    scaling: float = 2.0


def choose_experts(shape: Shape) -> torch.Tensor:
    """`(T, K)` distinct experts per token; `zipf` gives expert e a chance proportional to 1 / (e + 1)."""
    chances = torch.ones(shape.num_experts)
    if shape.routing == "zipf":
        chances = 1 / torch.arange(1, shape.num_experts + 1)
    return torch.multinomial(chances.expand(shape.num_tokens, -1), shape.top_k)


def make_problem(shape: Shape, dtype: torch.dtype) -> Problem:
    """Random tensors with a fixed seed."""
    torch.manual_seed(0)
    base = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype).requires_grad_(False)
    A = torch.randn(shape.num_experts, shape.rank, shape.in_features) / shape.in_features**0.5
    B = torch.randn(shape.num_experts, shape.rank, shape.out_features) / shape.rank**0.5
    return Problem(
        shape,
        dtype,
        base,
        torch.randn(shape.num_tokens, shape.in_features).to(dtype).requires_grad_(),
        nn.Parameter(A.to(dtype)),
        nn.Parameter(B.to(dtype)),
        choose_experts(shape),
        torch.rand(shape.num_tokens, shape.top_k).requires_grad_(),
        torch.randn(shape.num_tokens, shape.out_features).to(dtype),
    )


def base_alone(problem: Problem) -> Forward:
    """The frozen layer without adapter."""
    return problem.base


def peft_lora(problem: Problem, rank: int) -> Forward:
    """PEFT's own LoRA layer on the same base."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=rank, lora_alpha=int(problem.scaling * rank), lora_dropout=0.0)
    layer = Linear(problem.base, "default", config, r=rank, lora_alpha=config.lora_alpha)
    return layer.to(problem.dtype)


def ours(problem: Problem, backend: str) -> Forward:
    """The op of this package; makes its plan anew in each call, as a layer with a router of its own does."""

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        plan = DispatchPlan.from_index(problem.top_k_index, problem.shape.num_experts)
        return lora_experts(
            hidden_states,
            problem.base(hidden_states),
            problem.A,
            problem.B,
            plan=plan,
            top_k_weights=problem.top_k_weights,
            scaling=problem.scaling,
            backend=backend,
            inplace=True,
        )

    return forward


def expert_loop(problem: Problem) -> Forward:
    """A loop over experts as MoE-PEFT writes it, reduced to one linear: the base output is sliced per expert.

    The gates then weigh the base output too, so this is another function than the op, and no check compares the two.
    The loop that computes the op itself is the backend `eager`.
    """

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        base_out = problem.base(hidden_states)
        result = torch.zeros(base_out.shape, dtype=torch.float32)
        mask = nn.functional.one_hot(problem.top_k_index, problem.shape.num_experts).permute(2, 1, 0)
        for expert in range(problem.shape.num_experts):
            slot, token = torch.where(mask[expert])
            rows = hidden_states[None, token].reshape(-1, hidden_states.shape[-1])
            update = (rows @ problem.A[expert].T) @ problem.B[expert] * problem.scaling
            out = base_out[None, token].reshape(-1, base_out.shape[-1]) + update
            result.index_add_(0, token, (out * problem.top_k_weights[token, slot, None]).float())
        return result.to(base_out.dtype)

    return forward


def contenders(problem: Problem, only: list[str] | None = None) -> dict[str, Forward]:
    """Everything that can run this cell, by name; `only` keeps these backends."""
    shape = problem.shape
    found = {
        "base": base_alone(problem),
        "peft_r": peft_lora(problem, shape.rank),
        "loop": expert_loop(problem),
        "auto": ours(problem, "auto"),
    }
    if shape.top_k > 1:
        found["peft_kr"] = peft_lora(problem, shape.rank * shape.top_k)
    for name in BACKENDS:
        if can_run(problem, name) and (only is None or name in only):
            found[name] = ours(problem, name)
    return found


def can_run(problem: Problem, backend: str) -> bool:
    """Whether a backend takes the cell; `gather` only where its copies stay below the size of a large layer."""
    shape = problem.shape
    copied = shape.num_tokens * shape.top_k * shape.rank * (shape.in_features + shape.out_features)
    if backend == "gather" and copied > 2**22:
        return False
    try:
        explain(**shape_arguments(shape), dtype=problem.dtype, backend=backend)
    except RuntimeError:
        return False
    return True


def shape_arguments(shape: Shape) -> dict[str, int]:
    """The fields of a shape that `explain` takes."""
    return {name: value for name, value in shape._asdict().items() if name != "routing"}
