"""The shapes of the benchmark, fixed before any of them was timed."""

from __future__ import annotations

from typing import NamedTuple


NUM_SEQUENCES = 8


class Shape(NamedTuple):
    """One cell: D, O, T, E, R, K and how the tokens are spread over experts.

    `routing` is `uniform`, `zipf` (expert e has a chance proportional to 1 / (e + 1)), or `sequence`: eight sequences,
    of which each has the same experts for all its tokens. `forward_only` is inference; a single token always is.
    """

    in_features: int
    out_features: int
    num_tokens: int
    num_experts: int
    rank: int
    top_k: int
    routing: str = "uniform"
    forward_only: bool = False

    @property
    def is_inference(self) -> bool:
        """Whether there is no backward."""
        return self.forward_only or self.num_tokens == 1

    @property
    def kind(self) -> str:
        """`decode` or `prefill` (forward only, below and from 1024 tokens), `small` (T < 1024) or `train`."""
        is_small = self.num_tokens < 1024
        if self.is_inference:
            return "decode" if is_small else "prefill"
        return "small" if is_small else "train"

    @property
    def tokens_per_example(self) -> int:
        """How many consecutive tokens share their experts."""
        return max(1, self.num_tokens // NUM_SEQUENCES) if self.routing == "sequence" else 1

    def __str__(self) -> str:
        return (
            f"{self.in_features}x{self.out_features} T{self.num_tokens} E{self.num_experts} r{self.rank} "
            f"k{self.top_k} {self.routing}{' forward' if self.forward_only else ''}"
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

SQUARE, MLP, WIDE_MLP, FINE_GRAINED = (4096, 4096), (4096, 11008), (4096, 14336), (2048, 1024)

# in the order of importance: a run that is cut off has answered the first questions
CUDA: list[Shape] = [
    *product([SQUARE], [4096], [(8, 8), (8, 32)]),
    *product([MLP], [4096], [(8, 32)]),
    Shape(*SQUARE, 4096, 32, 16, 2),
    Shape(*SQUARE, 4096, 64, 32, 2),
    *[shape._replace(forward_only=True) for shape in product([SQUARE, MLP], [1], [(8, 16)])],
    *product([FINE_GRAINED], [4096], [(64, 16)]),
    *[shape._replace(routing="zipf") for shape in product([SQUARE], [4096], [(8, 32)])],
    *[shape._replace(routing="sequence") for shape in product([SQUARE], [4096], [(8, 16)])],
    *product([WIDE_MLP], [4096], [(8, 16)]),
    *product([SQUARE], [16384], [(8, 32)]),
    *[shape._replace(forward_only=True) for shape in product([SQUARE], [8, 64, 4096], [(8, 16)])],
    *product([SQUARE], [1024, 256], [(8, 16)]),
    Shape(*MLP, 4096, 32, 16, 2),
    Shape(*FINE_GRAINED, 4096, 64, 16, 2, "zipf"),
    Shape(*SQUARE, 4096, 8, 128, 2),
    *product([MLP], [1024], [(8, 32)]),
    *product([SQUARE], [1024], [(32, 16), (64, 32)]),
    *product([MLP], [16384], [(8, 16)]),
    *product([FINE_GRAINED], [1024, 16384], [(64, 32)]),
]

# seconds on any machine: that everything runs, no more
QUICK: list[Shape] = [
    *product([(64, 96)], [32], [(4, 8)]),
    Shape(64, 96, 1, 4, 8, 2),
    Shape(64, 96, 32, 4, 8, 2, "sequence"),
    Shape(64, 96, 32, 4, 8, 1, "zipf", forward_only=True),
]
