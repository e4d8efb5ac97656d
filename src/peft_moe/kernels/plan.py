"""`DispatchPlan`: which token goes to which expert, worked out once and shared by every linear a router serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Where each of the N = T·K (token, slot) pairs goes. Build it with [`DispatchPlan.from_index`].

    Everything beyond the two arguments is computed on first use and kept, so a backend that needs no sort never sorts.
    A *row* is a pair after sorting by expert; the sort is stable, so the rows of an expert keep the order of tokens.

    Args:
        example_index (`torch.Tensor` of shape `(B, K)`, int64):
            The experts of each example. An example may name the same expert twice; both count.
        num_experts (`int`):
            Number of experts (E).
        tokens_per_example (`int`):
            Consecutive tokens that share one row of `example_index` (S), so that T = B·S. With 1, the default, every
            token is routed on its own.
    """

    example_index: torch.Tensor
    num_experts: int
    tokens_per_example: int = 1
    derived: dict[object, Any] = field(default_factory=dict, init=False, repr=False)
    """What a backend derives from the plan and wants back in the next call, under a key of its own."""

    @classmethod
    def from_index(cls, top_k_index: torch.Tensor, num_experts: int, *, tokens_per_example: int = 1) -> DispatchPlan:
        """Make a plan from the choice of a router. Does not look at the values, so it never waits for a device.

        Args:
            top_k_index (`torch.Tensor` of shape `(B, K)`, int64):
                One row per example; per token, with `tokens_per_example=1`.
            num_experts (`int`), tokens_per_example (`int`):
                As above.

        Raises:
            `ValueError`: if `top_k_index` is not a 2-D int64 tensor or a number is not positive.
        """
        if top_k_index.dim() != 2 or top_k_index.dtype != torch.int64:
            raise ValueError(
                "DispatchPlan needs top_k_index as an int64 tensor of shape (tokens, top_k), but got "
                f"{top_k_index.dtype} of shape {tuple(top_k_index.shape)}. Flatten the leading dimensions with "
                "top_k_index.reshape(-1, top_k) and convert with .long()."
            )
        if num_experts < 1:
            raise ValueError(f"DispatchPlan needs num_experts >= 1, but got {num_experts}. Pass the router's E.")
        if tokens_per_example < 1:
            raise ValueError(
                f"DispatchPlan needs tokens_per_example >= 1, but got {tokens_per_example}. Pass the number of tokens "
                "that share one row of top_k_index."
            )
        return cls(top_k_index, num_experts, tokens_per_example)

    @classmethod
    def single_expert(cls, num_tokens: int, device: torch.device) -> DispatchPlan:
        """The plan of ordinary LoRA: every token uses expert 0, which is the only one."""
        return cls(torch.zeros(num_tokens, 1, dtype=torch.int64, device=device), 1)

    @property
    def num_tokens(self) -> int:
        """Number of tokens (T)."""
        return self.example_index.shape[0] * self.tokens_per_example

    @property
    def num_examples(self) -> int:
        """Number of examples (B); that of the tokens where each is routed on its own."""
        return self.example_index.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token (K)."""
        return self.example_index.shape[1]

    @property
    def top_k_index(self) -> torch.Tensor:
        """`(T, K)` int64: the experts of each token."""
        if self.tokens_per_example == 1:
            return self.example_index
        if "top_k_index" not in self.derived:  # no cached_property: compilers cannot trace its lock
            self.derived["top_k_index"] = per_token(self.example_index, self.tokens_per_example)
        index: torch.Tensor = self.derived["top_k_index"]
        return index

    @cached_property
    def pair_of_row(self) -> torch.Tensor:
        """`(N,)` int64: row → position of its pair in `top_k_index.flatten()`; a permutation of 0..N-1."""
        # int16 keys take fewer radix passes than int64 ones and hold every count of experts seen in practice
        key_dtype = torch.int16 if self.num_experts < 2**15 else torch.int64
        return torch.argsort(self.top_k_index.flatten().to(key_dtype), stable=True)

    @cached_property
    def token_of_row(self) -> torch.Tensor:
        """`(N,)` int64: row → token."""
        return self.pair_of_row if self.top_k == 1 else self.pair_of_row // self.top_k

    @cached_property
    def row_of_pair(self) -> torch.Tensor:
        """`(T, K)` int64: the inverse of `pair_of_row`."""
        rows = torch.empty_like(self.pair_of_row)
        rows[self.pair_of_row] = torch.arange(rows.shape[0], device=rows.device)
        return rows.view(self.num_tokens, self.top_k)

    @cached_property
    def expert_load(self) -> torch.Tensor:
        """`(E,)` int64: number of rows of each expert."""
        load = torch.zeros(self.num_experts, dtype=torch.int64, device=self.top_k_index.device)
        index = self.top_k_index.flatten()
        return load.scatter_add_(0, index, torch.ones_like(index))

    @cached_property
    def row_ends(self) -> torch.Tensor:
        """`(E,)` int32: where the rows of each expert end, the `offs` of `torch.nn.functional.grouped_mm`."""
        return self.expert_load.cumsum(0).to(torch.int32)


def per_token(rows_BK: torch.Tensor, tokens_per_example: int) -> torch.Tensor:
    """`(B, K)` → `(T, K)`: repeat what belongs to an example for each of its tokens."""
    return rows_BK if tokens_per_example == 1 else rows_BK.repeat_interleave(tokens_per_example, dim=0)
