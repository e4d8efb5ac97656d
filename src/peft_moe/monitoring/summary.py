"""The few numbers that say whether experts share the work: pure functions on counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


DEAD_THRESHOLD = 0.01


@dataclass(frozen=True)
class LoadSummary:
    """How evenly the experts of some routers are used.

    Args:
        entropy (`float`):
            Normalised load entropy, mean over routers: 1 is balanced, 0 is a single expert per router.
        max_share (`float`):
            Largest share that one expert of one router has of the choices of that router, in (0, 1].
        num_dead_experts (`int`), num_experts (`int`):
            Experts below the threshold of [`num_dead`], and all of them; both are sums over routers.
        busiest_router (`str`), busiest_expert (`int`):
            Where `max_share` was found.
    """

    entropy: float
    max_share: float
    num_dead_experts: int
    num_experts: int
    busiest_router: str
    busiest_expert: int

    @property
    def dead_fraction(self) -> float:
        """Share of the experts that are dead, in [0, 1]."""
        return self.num_dead_experts / self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """As plain values for json, `dead_fraction` included."""
        return {**asdict(self), "dead_fraction": self.dead_fraction}


def load_shares(counts: Sequence[int]) -> list[float]:
    """Share of each expert of one router, E values that sum to 1 (all 0 where nothing was counted).

    >>> load_shares([3, 1])
    [0.75, 0.25]
    """
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def normalized_entropy(counts: Sequence[int]) -> float:
    """Entropy of the shares of one router divided by `log E`: 1 is balanced, 0 is one expert for everything.

    A single expert is balanced by definition; counts that are all 0 give `nan`.

    >>> normalized_entropy([5, 5, 5, 5]), normalized_entropy([20, 0, 0, 0])
    (1.0, 0.0)
    """
    if not any(counts):
        return math.nan
    if len(counts) == 1:
        return 1.0
    entropy = sum(-share * math.log(share) for share in load_shares(counts) if share)
    return min(entropy / math.log(len(counts)), 1.0)


def num_dead(counts: Sequence[int], *, dead_threshold: float = DEAD_THRESHOLD) -> int:
    """How many experts of one router get less than `dead_threshold` times the balanced share `1 / E`.

    >>> num_dead([500, 499, 1, 0])
    2
    """
    smallest = dead_threshold * sum(counts) / len(counts)
    return sum(count < smallest or count == 0 for count in counts)


def summarize_load(
    by_router: Mapping[str, Sequence[int]], *, dead_threshold: float = DEAD_THRESHOLD
) -> LoadSummary | None:
    """Summarise the counts `router name → E counts`; routers that saw no token do not enter.

    Args:
        by_router (`Mapping[str, Sequence[int]]`): as [`ExpertLoad.by_router`] gives them.
        dead_threshold (`float`): see [`num_dead`].

    Returns:
        [`LoadSummary`], or `None` where nothing was counted.

    >>> summarize_load({"layers.0.mlp": [6, 2], "layers.1.mlp": [4, 4]}).max_share
    0.75
    """
    seen = {name: counts for name, counts in by_router.items() if any(counts)}
    if not seen:
        return None
    busiest_router = max(seen, key=lambda name: max(load_shares(seen[name])))
    shares = load_shares(seen[busiest_router])
    return LoadSummary(
        entropy=sum(normalized_entropy(counts) for counts in seen.values()) / len(seen),
        max_share=max(shares),
        num_dead_experts=sum(num_dead(counts, dead_threshold=dead_threshold) for counts in seen.values()),
        num_experts=sum(len(counts) for counts in seen.values()),
        busiest_router=busiest_router,
        busiest_expert=shares.index(max(shares)),
    )
