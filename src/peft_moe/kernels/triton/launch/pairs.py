"""Starts the programs for a few pairs."""

from __future__ import annotations

import torch
import triton

from ..programs import pairs as programs
from ..rows import Rows
from ..tiles import needs_upcast, next_power_of_two
from .device import on_its_device


# ranks of a program that shrinks: few, so that a single token already occupies many cores
SHRINK_RANKS = 4
SHRINK_COLUMNS = 512
EXPAND_RANKS = 16
EXPAND_COLUMNS = 128
WARPS = 4


def shrink_settings() -> dict[str, int]:
    """The tile of a program that shrinks."""
    return {"BLOCK_R": SHRINK_RANKS, "BLOCK_D": SHRINK_COLUMNS}


def expand_settings(rank: int) -> dict[str, int]:
    """The tile of a program that expands."""
    return {"BLOCK_R": min(next_power_of_two(rank), EXPAND_RANKS), "BLOCK_W": EXPAND_COLUMNS}


@on_its_device
def run_shrink(x_TD: torch.Tensor, w_ERD: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, None]:
    """`W_e x_t` for every pair `(N, R)`; no dot products, which only backward wants."""
    _, rank, width = w_ERD.shape
    num_pairs = rows.num_tokens * rows.top_k
    out_NR = x_TD.new_empty(num_pairs, rank)
    if num_pairs:
        programs.shrink_pairs[(num_pairs, triton.cdiv(rank, SHRINK_RANKS))](
            x_TD,
            w_ERD,
            rows.index_BK,
            out_NR,
            rows.tokens_per_example,
            width,
            x_TD.stride(0),
            K=rows.top_k,
            R=rank,
            UPCAST=needs_upcast(x_TD.dtype),
            **shrink_settings(),
            num_warps=WARPS,
        )
    return out_NR, None


@on_its_device
def run_expand(
    h_NR: torch.Tensor,
    w_ERO: torch.Tensor,
    weights_BK: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    source_TO: torch.Tensor,
    out_TO: torch.Tensor,
) -> torch.Tensor:
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_tk`; `out` may be `source`."""
    _, rank, width = w_ERO.shape
    if rows.num_tokens:
        programs.expand_pairs[(rows.num_tokens, triton.cdiv(width, EXPAND_COLUMNS))](
            h_NR,
            w_ERO,
            weights_BK,
            rows.index_BK,
            source_TO,
            out_TO,
            rows.tokens_per_example,
            width,
            source_TO.stride(0),
            scaling,
            K=rows.top_k,
            R=rank,
            HAS_WEIGHT=weights_BK is not None,
            UPCAST=needs_upcast(h_NR.dtype),
            **expand_settings(rank),
            num_warps=WARPS,
        )
    return out_TO
