"""`Case`: the facts about one call that decide whether a backend can run it and which one runs it fastest."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One call of [`lora_experts`], without its tensors.

    `top_k` is 0 for ordinary LoRA, where there is one expert and nothing to dispatch (`plan=None`).
    `tokens_per_example` is above 1 where whole examples are routed.
    """

    num_tokens: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int
    top_k: int
    dtype: torch.dtype
    device: str
    tokens_per_example: int = 1

    @property
    def num_examples(self) -> int:
        """How many rows the plan has."""
        return self.num_tokens // self.tokens_per_example

    @property
    def is_dispatched(self) -> bool:
        """Whether tokens go to different experts; false for ordinary LoRA."""
        return self.top_k > 0

    def describe(self) -> str:
        """The case in one line, for logs and errors."""
        route = f"top_k={self.top_k}" if self.is_dispatched else "no dispatch"
        if self.tokens_per_example > 1:
            route += f" per {self.tokens_per_example} tokens"
        return (
            f"tokens={self.num_tokens}, in={self.in_features}, out={self.out_features}, experts={self.num_experts}, "
            f"rank={self.rank}, {route}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        )
