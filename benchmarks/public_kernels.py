"""LoRA experts by the kernels of others, taken as they are installed here. Not needed by this package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import Forward, Problem


def scattermoe(problem: Problem) -> Forward:
    """ScatterMoE's `ParallelLinear`, once for A and once for B; the second weighs and combines.

    github.com/shawntan/scattermoe; it has no LoRA of its own, so this is what a user of it would write.
    """
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    top_k = problem.shape.top_k

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        order = flatten_sort_count(problem.token_index, problem.shape.num_experts)
        projected = parallel_linear(hidden_states, problem.A.transpose(1, 2), top_k, *order, grouped_out=True)
        gates = (problem.token_weights * problem.scaling).to(problem.dtype)
        return problem.base(hidden_states) + parallel_linear(
            projected, problem.B, 1, *order, gates=gates, grouped_in=True
        )

    return forward


# axolotl's kernel and vLLM's compute another function: experts of an FFN that each have a frozen weight of their own
PUBLIC: dict[str, Callable[[Problem], Forward]] = {"scattermoe": scattermoe}
