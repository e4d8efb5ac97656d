"""What the benchmark compares. Each contender is a whole layer: a frozen `nn.Linear` and its adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from unittest.mock import patch

import torch
from shapes import Shape
from torch import nn

from peft_moe.kernels import BACKENDS, DispatchPlan, explain, lora_experts
from peft_moe.kernels.backends import triton as triton_backend
from peft_moe.kernels.triton.paths import path_of


Forward = Callable[[torch.Tensor], torch.Tensor]

# these wait for the device in the middle of a call, or may do so, and no graph can hold that
WAITING = {"eager", "loop", "pair_loop", "scattermoe"}


@dataclass
class Problem:
    """Tensors of one cell, the same for every contender; index and weights per example."""

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

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What the op has gradients for."""
        return [self.hidden_states, self.A, self.B, self.top_k_weights]

    @cached_property
    def token_index(self) -> torch.Tensor:
        """`(T, K)`: the experts of each token."""
        return self.top_k_index.repeat_interleave(self.shape.tokens_per_example, dim=0)

    @property
    def token_weights(self) -> torch.Tensor:
        """`(T, K)`: the weights of each token; part of the graph."""
        per_example = self.shape.tokens_per_example
        return self.top_k_weights if per_example == 1 else self.top_k_weights.repeat_interleave(per_example, dim=0)


@dataclass
class Contender:
    """A layer, the tensors for which its step computes gradients, and whether it computes the op of this package.

    `context` holds during its step.
    """

    forward: Forward
    leaves: list[torch.Tensor]
    is_the_op: bool = True
    context: Callable[[], AbstractContextManager] = nullcontext


def choose_experts(shape: Shape, device: str = "cpu") -> torch.Tensor:
    """`(B, K)` distinct experts per example."""
    chances = torch.ones(shape.num_experts, device=device)
    if shape.routing == "zipf":
        chances = 1 / torch.arange(1, shape.num_experts + 1, device=device)
    return torch.multinomial(chances.expand(shape.num_tokens // shape.tokens_per_example, -1), shape.top_k)


def make_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random tensors with a fixed seed."""
    torch.manual_seed(0)
    base = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype, device=device)
    A = torch.randn(shape.num_experts, shape.rank, shape.in_features, device=device) / shape.in_features**0.5
    B = torch.randn(shape.num_experts, shape.rank, shape.out_features, device=device) / shape.rank**0.5
    index = choose_experts(shape, device)
    return Problem(
        shape,
        dtype,
        base.requires_grad_(False),
        torch.randn(shape.num_tokens, shape.in_features, device=device).to(dtype).requires_grad_(),
        nn.Parameter(A.to(dtype)),
        nn.Parameter(B.to(dtype)),
        index,
        torch.rand(index.shape, device=device).requires_grad_(),
        torch.randn(shape.num_tokens, shape.out_features, device=device).to(dtype),
    )


def in_double(problem: Problem) -> Problem:
    """The same numbers, after rounding to the dtype of the problem, in float64."""
    base = nn.Linear(*problem.base.weight.shape[::-1], bias=False, dtype=torch.float64, device="meta")
    base.weight = nn.Parameter(problem.base.weight.double(), requires_grad=False)
    doubled = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    x, A, B, weights = doubled
    return Problem(
        problem.shape, torch.float64, base, x, A, B, problem.top_k_index, weights, problem.grad_out.double()
    )


def base_alone(problem: Problem) -> Contender:
    """The frozen layer without adapter."""
    return Contender(problem.base, [problem.hidden_states], is_the_op=False)


def peft_lora(problem: Problem, rank: int, compiler: str | None = None) -> Contender:
    """PEFT's own LoRA layer on the same base, with random weights; `compiler` is a backend of `torch.compile`."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=rank, lora_alpha=int(problem.scaling * rank), lora_dropout=0.0)
    layer = Linear(problem.base, "default", config, r=rank, lora_alpha=config.lora_alpha)
    layer = layer.to(problem.hidden_states.device, problem.dtype)
    nn.init.normal_(layer.lora_B["default"].weight)  # PEFT's zeros would be cheaper to multiply with on a GPU
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    forward: Forward = layer
    if compiler:
        torch.compiler.reset()
        forward = torch.compile(layer, backend=compiler, dynamic=False)
    return Contender(forward, [problem.hidden_states, *trained], is_the_op=False)


def ours(problem: Problem, backend: str) -> Contender:
    """The op of this package; makes its plan anew in each call, as a layer with a router of its own does."""
    shape = problem.shape

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        plan = DispatchPlan.from_index(
            problem.top_k_index, shape.num_experts, tokens_per_example=shape.tokens_per_example
        )
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

    return Contender(forward, problem.leaves)


def sorted_triton(problem: Problem) -> Contender:
    """The programs for sorted tokens on a shape for which `triton` takes another path."""
    contender = ours(problem, "triton")
    contender.context = partial(patch.object, triton_backend, "path_of", lambda *shape: "sorted")
    return contender


def plain_lora(problem: Problem) -> Contender:
    """Ordinary LoRA of rank r as this package writes it, without the passes in which PEFT scales and adds."""
    A, B = (nn.Parameter(stack[:1].detach().clone()) for stack in (problem.A, problem.B))

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        base_out = problem.base(hidden_states)
        return lora_experts(hidden_states, base_out, A, B, scaling=problem.scaling, backend="plain", inplace=True)

    return Contender(forward, [problem.hidden_states, A, B], is_the_op=False)


def expert_loop(problem: Problem) -> Contender:
    """A loop over experts as MoE-PEFT writes it, reduced to one linear: the base output is sliced per expert.

    The gates then weigh the base output too, so this is another function than the op, and no check compares the two.
    The loop that computes the op itself is the backend `eager`.
    """

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        base_out, weights = problem.base(hidden_states), problem.token_weights
        result = torch.zeros(base_out.shape, dtype=torch.float32, device=base_out.device)
        mask = nn.functional.one_hot(problem.token_index, problem.shape.num_experts).permute(2, 1, 0)
        for expert in range(problem.shape.num_experts):
            slot, token = torch.where(mask[expert])
            rows = hidden_states[None, token].reshape(-1, hidden_states.shape[-1])
            update = (rows @ problem.A[expert].T) @ problem.B[expert] * problem.scaling
            out = base_out[None, token].reshape(-1, base_out.shape[-1]) + update
            result.index_add_(0, token, (out * weights[token, slot, None]).float())
        return result.to(base_out.dtype)

    return Contender(forward, problem.leaves, is_the_op=False)


def contenders(problem: Problem, only: list[str] | None = None, compiler: str | None = None) -> dict[str, Contender]:
    """Everything that can run this cell, by name; `only` keeps these backends."""
    shape = problem.shape
    found = {
        "base": base_alone(problem),
        "base_again": base_alone(problem),
        "peft_r": peft_lora(problem, shape.rank),
        "plain_r": plain_lora(problem),
        "loop": expert_loop(problem),
        "auto": ours(problem, "auto"),
    }
    if shape.top_k > 1:
        found["peft_kr"] = peft_lora(problem, shape.rank * shape.top_k)
    if compiler:
        found["peft_r_compiled"] = peft_lora(problem, shape.rank, compiler)
    for name in BACKENDS:
        if can_run(problem, name) and (only is None or name in only):
            found[name] = ours(problem, name)
    path = path_of(shape.num_tokens, shape.tokens_per_example, shape.num_experts, shape.top_k, shape.rank)
    if "triton" in found and path != "sorted":
        found["triton_sorted"] = sorted_triton(problem)
    return found


def can_run(problem: Problem, backend: str) -> bool:
    """Whether a backend takes the cell; `gather` only where its copies stay below the size of a large layer."""
    shape = problem.shape
    num_examples = shape.num_tokens // shape.tokens_per_example
    copied = num_examples * shape.top_k * shape.rank * (shape.in_features + shape.out_features)
    device = problem.hidden_states.device.type
    if backend == "gather" and copied > 2 ** (22 if device == "cpu" else 26):
        return False
    try:
        explain(**shape_arguments(shape), dtype=problem.dtype, device=device, backend=backend)
    except RuntimeError:
        return False
    return True


def shape_arguments(shape: Shape) -> dict[str, int]:
    """What `explain` wants to know of a shape."""
    names = ("num_tokens", "in_features", "out_features", "num_experts", "rank", "top_k", "tokens_per_example")
    return {name: getattr(shape, name) for name in names}
