"""The rule behind `backend="auto"`, as data: the first row that fits a case, and whose backend can run it, decides.

Fitted by `benchmarks/fit_auto_rule.py`; a row says what it rests on.
"""

from __future__ import annotations

from typing import NamedTuple

from .case import Case


class Row(NamedTuple):
    """One line of the rule. A condition left at its default always holds.

    Args:
        backend (`str`):
            What to run.
        because (`str`):
            The reason, shown by `explain` and in the log.
        device (`str`):
            Device type, `""` for any.
        is_dispatched (`bool` or `None`):
            Whether there is a plan; `None` for either.
        max_pairs (`int` or `None`):
            Largest number of (token, slot) pairs T·K.
        min_pairs (`int`):
            Smallest number of pairs.
        max_top_k, min_top_k (`int`):
            Bounds of K.
        max_relative_rank (`float`):
            Largest E·R divided by the smaller of in and out features: how much dearer dense is than the base layer.
    """

    backend: str
    because: str
    device: str = ""
    is_dispatched: bool | None = None
    max_pairs: int | None = None
    min_pairs: int = 0
    min_top_k: int = 0
    max_top_k: int | None = None
    max_relative_rank: float | None = None

    def fits(self, case: Case) -> bool:
        """Whether this row speaks about `case`."""
        pairs = case.num_tokens * max(case.top_k, 1)
        relative_rank = case.num_experts * case.rank / max(1, min(case.in_features, case.out_features))
        return (
            self.device in ("", case.device)
            and self.is_dispatched in (None, case.is_dispatched)
            and self.min_pairs <= pairs
            and (self.max_pairs is None or pairs <= self.max_pairs)
            and self.min_top_k <= case.top_k
            and (self.max_top_k is None or case.top_k <= self.max_top_k)
            and (self.max_relative_rank is None or relative_rank <= self.max_relative_rank)
        )


RULE: tuple[Row, ...] = (
    Row("plain", "there is one expert and nothing to dispatch", is_dispatched=False),
    Row("pair_loop", "a handful of pairs on a CPU: nothing is cheaper than to use the experts in place", device="cpu",
        max_pairs=4),
    Row("gather", "few tokens: copying the chosen experts is cheaper than sorting", max_pairs=2),
    Row("dense", "top-1 with few columns", device="cpu", max_top_k=1, max_relative_rank=0.05),
    Row("dense", "top-2 with few columns", device="cpu", min_top_k=2, max_relative_rank=0.15),
    Row("segment", "many columns on a CPU", device="cpu"),
    Row("dense", "few columns against a GPU's ratio of compute to bandwidth (model, not measured)",
        device="cuda", max_relative_rank=0.0625),
    Row("grouped_mm", "many columns on a GPU (model, not measured)", device="cuda"),
    Row("dense", "runs everywhere"),
)

# for a compiler the choice is between backends that trace whole
COMPILED_RULE: tuple[Row, ...] = (Row("dense", "traces whole under torch.compile"),)
