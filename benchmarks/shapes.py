"""The shapes of the benchmark, fixed before any of them was timed."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One cell: D, O, T, E, R, K and how the tokens are spread over experts."""

    in_features: int
    out_features: int
    num_tokens: int
    num_experts: int
    rank: int
    top_k: int
    routing: str = "uniform"

    @property
    def kind(self) -> str:
        """`decode` (forward only, T = 1), `small` (T < 1024) or `train`."""
        if self.num_tokens == 1:
            return "decode"
        return "train" if self.num_tokens >= 1024 else "small"

    def __str__(self) -> str:
        return (
            f"{self.in_features}x{self.out_features} T{self.num_tokens} E{self.num_experts} r{self.rank} "
            f"k{self.top_k} {self.routing}"
        )


def product(widths: list[tuple[int, int]], tokens: list[int], experts: list[tuple[int, int]]) -> list[Shape]:
    """Every combination, for top-1 and top-2."""
    return [
        Shape(*width, num_tokens, num_experts, rank, top_k)
        for num_tokens in tokens
        for width in widths
        for num_experts, rank in experts
        for top_k in (1, 2)
    ]


SQUARE_AND_MLP = [(512, 512), (1024, 2816)]

DEFAULT: list[Shape] = [
    *product([*SQUARE_AND_MLP, (4096, 4096)], [1], [(8, 16)]),
    *product([(1024, 2816)], [1], [(32, 64)]),
    *product(SQUARE_AND_MLP, [8], [(8, 16)]),
    *product(SQUARE_AND_MLP, [64], [(8, 8), (32, 16)]),
    *product([(1024, 1024)], [256], [(8, 16), (32, 16)]),
    *product([(512, 512), (1024, 1024)], [1024], [(3, 16), (8, 8), (8, 32), (8, 128), (32, 16)]),
    *product([(1024, 2816)], [1024], [(8, 8), (32, 16)]),
    *product([(2048, 2048)], [1024], [(8, 32)]),
    *product([(512, 512)], [4096], [(3, 16), (8, 32), (32, 16)]),
    *product([(1024, 1024)], [4096], [(8, 32), (32, 16)]),
    # under Zipf's law the first expert gets a third of the tokens: segments of very different lengths
    *[shape._replace(routing="zipf") for shape in product([(1024, 1024)], [1024], [(8, 32), (32, 16)])],
]

FULL: list[Shape] = DEFAULT + [
    shape
    for shape in [
        *product(
            [(512, 512), (1024, 1024), (1024, 2816), (4096, 4096)],
            [1, 2, 4, 8, 16, 32, 64, 256],
            [(3, 8), (8, 32), (32, 64)],
        ),
        *product([(2048, 2048), (4096, 4096)], [1024], [(3, 8), (8, 32), (8, 128), (32, 64)]),
        *product([(1024, 2816), (2048, 2048)], [4096], [(3, 8), (8, 32), (32, 64)]),
    ]
    if shape not in DEFAULT
]
