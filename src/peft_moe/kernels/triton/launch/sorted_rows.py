"""Starts the programs for sorted rows."""

from __future__ import annotations

import torch
import triton

from ..programs import sorted_rows as programs
from ..rows import Rows
from ..tiles import (
    expand_rank_block,
    expand_tiles,
    gradient_tiles,
    next_power_of_two,
    options,
    precision_of,
    rank_block,
    shrink_tiles,
    splits_of,
)
from .device import on_its_device


@on_its_device
def run_shrink(
    x_TD: torch.Tensor, w_ERD: torch.Tensor, rows: Rows, other_NR: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`W_e x_t` for every row `(N, R)`, and with `other` its dot product with that, `(T, K)` float32."""
    assert rows.order is not None
    num_experts, rank, width = w_ERD.shape
    num_rows, num_segments = rows.num_tokens * rows.top_k, rows.top_k * rows.num_experts
    out_NR = x_TD.new_empty(num_rows, rank)
    block = rank_block(rank)
    num_blocks = triton.cdiv(rank, block)
    dots = None
    if other_NR is not None:
        dots = x_TD.new_empty(num_blocks, rows.num_tokens, rows.top_k, dtype=torch.float32)
    if num_rows:
        tiles = shrink_tiles(num_rows, num_segments, rank, x_TD.dtype)
        grid = (triton.cdiv(num_rows, tiles.rows) + num_segments, num_blocks)
        programs.shrink[grid](
            x_TD,
            w_ERD,
            rows.order.token_of_row,
            rows.order.segment_end,
            out_NR,
            other_NR,
            dots,
            rows.num_tokens,
            width,
            x_TD.stride(0),
            E=num_experts,
            K=rows.top_k,
            R=rank,
            SEGMENTS=next_power_of_two(num_segments),
            HAS_OTHER=other_NR is not None,
            BLOCK_M=tiles.rows,
            BLOCK_R=block,
            BLOCK_D=tiles.columns,
            **options(tiles),
            **precision_of(x_TD.dtype),
        )
    if dots is None:
        return out_NR, None
    return out_NR, dots[0] if num_blocks == 1 else dots.sum(0)


@on_its_device
def run_expand(
    h_NR: torch.Tensor,
    w_ERO: torch.Tensor,
    weights_BK: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    source_TO: torch.Tensor | None,
    out_TO: torch.Tensor,
) -> torch.Tensor:
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_n`, slot after slot; `out` may be `source`."""
    assert rows.order is not None
    num_experts, rank, width = w_ERO.shape
    if not rows.num_tokens:
        return out_TO
    tiles = expand_tiles(rows.num_tokens, rows.num_experts, rank, h_NR.dtype)
    grid = (triton.cdiv(rows.num_tokens, tiles.rows) + rows.num_experts, triton.cdiv(width, tiles.columns))
    for slot in range(rows.top_k):
        source = source_TO if slot == 0 else out_TO
        programs.expand[grid](
            h_NR,
            w_ERO,
            weights_BK,
            rows.order.token_of_row,
            rows.order.segment_end,
            source,
            out_TO,
            rows.num_tokens,
            rows.tokens_per_example,
            width,
            0 if source is None else source.stride(0),
            scaling,
            slot,
            E=num_experts,
            K=rows.top_k,
            R=rank,
            SEGMENTS=next_power_of_two(num_experts),
            HAS_WEIGHT=weights_BK is not None,
            HAS_SOURCE=source is not None,
            BLOCK_M=tiles.rows,
            BLOCK_W=tiles.columns,
            BLOCK_R=expand_rank_block(rank, h_NR.dtype),
            **options(tiles),
            **precision_of(h_NR.dtype),
        )
    return out_TO


@on_its_device
def run_weight_gradient(
    h_NR: torch.Tensor, y_TW: torch.Tensor, weights_BK: torch.Tensor | None, rows: Rows, scaling: float
) -> torch.Tensor:
    """`Σ_n scaling · w_bk · h_n y_tᵀ` over the rows of each expert, `(E, R, W)` in the dtype of `h`.

    Long sums are split, and the parts added in a fixed order, so that no two programs write to one place.
    """
    assert rows.order is not None
    rank, width = h_NR.shape[1], y_TW.shape[1]
    num_rows = h_NR.shape[0]
    if not num_rows:
        return h_NR.new_zeros(rows.num_experts, rank, width)
    splits = splits_of(num_rows // rows.num_experts)
    out = torch.empty(splits, rows.num_experts, rank, width, dtype=torch.float32, device=h_NR.device)
    tiles, block = gradient_tiles(rank, h_NR.dtype), rank_block(rank)
    grid = (rows.num_experts * splits, triton.cdiv(rank, block), triton.cdiv(width, tiles.columns))
    programs.weight_gradient[grid](
        h_NR,
        y_TW,
        weights_BK,
        rows.order.token_of_row,
        rows.order.segment_end,
        out,
        rows.num_tokens,
        rows.tokens_per_example,
        width,
        y_TW.stride(0),
        scaling,
        E=rows.num_experts,
        K=rows.top_k,
        R=rank,
        SPLITS=splits,
        HAS_WEIGHT=weights_BK is not None,
        BLOCK_R=block,
        BLOCK_W=tiles.columns,
        BLOCK_N=tiles.rows,
        **options(tiles),
        **precision_of(h_NR.dtype),
    )
    return (out[0] if splits == 1 else out.sum(0)).to(h_NR.dtype)
