"""Shapes that every backend must get right, each with the reason for which it is here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from peft_moe.kernels import DispatchPlan


@dataclass(frozen=True)
class KernelCase:
    """One call of the op. `forced` overwrites the random choice of experts."""

    why: str
    num_tokens: int = 9
    in_features: int = 16
    out_features: int = 24
    num_experts: int = 4
    rank: int = 8
    top_k: int = 2
    forced: list[list[int]] | None = None
    is_strided: bool = False
    has_expanded_grad: bool = False
    is_dispatched: bool = True
    tokens_per_example: int = 1
    scaling: float = field(default=0.75)


CASES: dict[str, KernelCase] = {
    "top_1": KernelCase("each token visits one expert", top_k=1),
    "top_2": KernelCase("the outputs of two experts are added"),
    "one_token": KernelCase("decoding", num_tokens=1),
    "no_tokens": KernelCase("an empty batch on one rank", num_tokens=0),
    "empty_experts": KernelCase("gradients of unused experts are zero", top_k=1, forced=[[3]] * 4 + [[1]] * 5),
    "all_on_one": KernelCase("the router collapsed", top_k=1, forced=[[2]] * 9),
    "one_expert": KernelCase("E = 1 with a plan", num_experts=1, top_k=1),
    "k_equals_e": KernelCase("a dense mixture", num_experts=3, top_k=3),
    "same_expert_twice": KernelCase("both slots count", forced=[[1, 1]] * 9),
    "odd_sizes": KernelCase("nothing is a multiple of anything", 7, 13, 11, 3, 5, 2),
    "rank_three": KernelCase("rank is not a power of two", rank=3),
    "rank_24": KernelCase("rank is not a power of two, but a multiple of 16 bytes", rank=24),
    "strided": KernelCase("inputs are slices of larger tensors", is_strided=True),
    "expanded_grad": KernelCase("the gradient of out.sum() has stride 0", has_expanded_grad=True),
    "hundred_tokens": KernelCase("more tokens than experts or columns", num_tokens=100, num_experts=6),
    "by_example": KernelCase("whole examples are routed, as in MoCLE", num_tokens=12, tokens_per_example=4),
    "by_example_forced": KernelCase(
        "two examples share an expert, one names it twice",
        num_tokens=9,
        tokens_per_example=3,
        forced=[[1, 3]] * 2 + [[3, 3]],
    ),
    "one_example": KernelCase("a batch of one", num_tokens=5, tokens_per_example=5, top_k=3),
    "plain_lora": KernelCase("no plan: ordinary LoRA", num_experts=1, top_k=1, is_dispatched=False),
}


def tensor(case: KernelCase, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal random numbers; a non-contiguous view if the case asks for it."""
    if case.is_strided:
        wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)
        return wide[..., 1::2].detach().requires_grad_()
    return torch.randn(*shape).to(dtype).requires_grad_()


def make_inputs(case: KernelCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The five differentiable inputs, by the names of the arguments; the seed is fixed."""
    torch.manual_seed(0)
    return {
        "hidden_states": tensor(case, case.num_tokens, case.in_features, dtype=dtype),
        "base_out": tensor(case, case.num_tokens, case.out_features, dtype=dtype),
        "A": tensor(case, case.num_experts, case.rank, case.in_features, dtype=dtype),
        "B": tensor(case, case.num_experts, case.rank, case.out_features, dtype=dtype),
        "top_k_weights": tensor(
            case, num_examples(case), case.top_k, dtype=dtype if dtype is torch.float64 else torch.float32
        ),
    }


def num_examples(case: KernelCase) -> int:
    """How many rows the plan has."""
    return case.num_tokens // case.tokens_per_example


def make_index(case: KernelCase) -> torch.Tensor:
    """`(B, K)` distinct experts per example (per token, if not said otherwise), or those that the case forces."""
    torch.manual_seed(1)
    if case.forced is not None:
        return torch.tensor(case.forced)
    if case.num_tokens == 0:
        return torch.empty(0, case.top_k, dtype=torch.int64)
    return torch.stack([torch.randperm(case.num_experts)[: case.top_k] for _ in range(num_examples(case))])


def plan_of(case: KernelCase, device: str | torch.device = "cpu") -> DispatchPlan:
    """The plan of `make_index`."""
    index = make_index(case).to(device)
    return DispatchPlan.from_index(index, case.num_experts, tokens_per_example=case.tokens_per_example)


def make_grad_out(case: KernelCase, dtype: torch.dtype) -> torch.Tensor:
    """A random gradient of the output, or ones with stride 0."""
    torch.manual_seed(2)
    shape = (case.num_tokens, case.out_features)
    return torch.ones((), dtype=dtype).expand(shape) if case.has_expanded_grad else torch.randn(shape).to(dtype)
