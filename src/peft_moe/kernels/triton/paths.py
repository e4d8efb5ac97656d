"""Which of the ways through the programs a call takes. Nothing here was tuned on a device."""

from __future__ import annotations

from typing import Literal


Path = Literal["decode", "examples", "dense", "sorted"]

MAX_DECODE_PAIRS = 64
# each pair reads its expert anew; beyond this, that costs more than to sort
MAX_DECODE_RANKS = 4096
# a tile of rows lies within one example, and tensor cores take 16
MIN_TOKENS_PER_EXAMPLE = 16
# the gradient of an expert looks through the choices of all examples
MAX_CHOICES = 1024
# E·R for each slot: so far, in a model of bytes and operations, all experts cost no more than the K chosen ones,
# sorted
MAX_DENSE_RANKS = 128

REASONS: dict[Path, str] = {
    "decode": "a few pairs of token and expert: each is computed on its own, in two launches and without a sort",
    "examples": "whole examples are routed: tiles lie within an example, without a sort",
    "dense": "a few narrow experts: all of them for all tokens, without a sort",
    "sorted": "tokens are sorted by expert",
}


def path_of(num_tokens: int, tokens_per_example: int, num_experts: int, top_k: int, rank: int) -> Path:
    """The path for T tokens, of which S consecutive ones share their K of E experts of rank R."""
    pairs = num_tokens * top_k
    if pairs <= MAX_DECODE_PAIRS and pairs * rank <= MAX_DECODE_RANKS:
        return "decode"
    if tokens_per_example >= MIN_TOKENS_PER_EXAMPLE and pairs <= MAX_CHOICES * tokens_per_example:
        return "examples"
    return "dense" if num_experts * rank <= MAX_DENSE_RANKS * top_k else "sorted"
