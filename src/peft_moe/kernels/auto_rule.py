"""The rule behind `backend="auto"`, as data: the first row that fits a case, and whose backend can run it, decides.

The rows for the CPU are fitted by `benchmarks/fit_auto_rule.py` to `benchmarks/results/cpu_fp32.json`. Those for other
devices follow from a model of FLOPs and bytes and say so, until the script has a result file of such a device to fit.
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
        min_top_k, max_top_k (`int`):
            Bounds of K.
        max_pairs (`float`):
            Largest number of (token, slot) pairs T·K.
        min_tokens_per_example (`int`):
            Smallest number of tokens that are routed as one.
        max_relative_rank (`float`):
            Largest E·R divided by the smaller of in and out features: how dear `dense` is against the base layer.
    """

    backend: str
    because: str
    device: str = ""
    is_dispatched: bool | None = None
    min_top_k: int = 0
    max_top_k: float = float("inf")
    max_pairs: float = float("inf")
    min_tokens_per_example: int = 1
    max_relative_rank: float = float("inf")

    def fits(self, case: Case) -> bool:
        """Whether this row speaks about `case`."""
        pairs = case.num_tokens * max(case.top_k, 1)
        width = max(1, min(case.in_features, case.out_features))
        return (
            self.device in ("", case.device)
            and self.is_dispatched in (None, case.is_dispatched)
            and self.min_top_k <= case.top_k <= self.max_top_k
            and pairs <= self.max_pairs
            and self.min_tokens_per_example <= case.tokens_per_example
            and case.num_experts * case.rank <= self.max_relative_rank * width
        )


RULE: tuple[Row, ...] = (
    Row("plain", "there is one expert and nothing to dispatch", is_dispatched=False),
    Row("gather", "whole examples are routed: one batched product, no sort", min_tokens_per_example=2),
    Row("pair_loop", "a handful of pairs: nothing is cheaper than to use the experts in place", "cpu", max_pairs=8),
    Row("dense", "several slots and few columns: cheaper than sorting", "cpu", min_top_k=2, max_relative_rank=0.1),
    Row("grouped_mm", "few pairs: the loop over experts is better left to torch", "cpu", max_pairs=512),
    Row("segment", "many pairs, handled in chunks that fit the cache", "cpu"),
    Row("gather", "a handful of pairs: copying the chosen experts needs no sort (not measured)", max_pairs=8),
    Row("dense", "few columns against a GPU's FLOPs per byte (not measured)", "cuda", max_relative_rank=0.0625),
    Row("grouped_mm", "many columns on a GPU (not measured)", "cuda"),
    Row("dense", "runs everywhere"),
)

# under a compiler the choice is between backends that trace whole
COMPILED_RULE: tuple[Row, ...] = (
    Row("plain", "there is one expert and nothing to dispatch", is_dispatched=False),
    Row("gather", "whole examples are routed: one batched product, no sort", min_tokens_per_example=2),
    Row("dense", "traces whole under torch.compile"),
)
