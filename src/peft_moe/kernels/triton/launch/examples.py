"""Starts the programs for tokens that stay where they are."""

from __future__ import annotations

import torch
import triton

from ..programs import examples as programs
from ..rows import Rows
from ..tiles import (
    expand_rank_block,
    expand_tiles,
    gradient_tiles,
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
    """`W_e x_t` for every pair `(N, R)`, and with `other` its dot product with that, `(T, K)` float32."""
    _, rank, width = w_ERD.shape
    num_tokens, top_k = rows.num_tokens, rows.top_k
    out_NR = x_TD.new_empty(num_tokens * top_k, rank)
    block = rank_block(top_k * rank)
    num_blocks = triton.cdiv(top_k * rank, block)
    dots = None
    if other_NR is not None:
        dots = x_TD.new_empty(num_blocks, num_tokens, top_k, dtype=torch.float32)
    if num_tokens:
        tiles = shrink_tiles(num_tokens, rows.num_examples, top_k * rank, x_TD.dtype)
        grid = (rows.num_examples * triton.cdiv(rows.tokens_per_example, tiles.rows), num_blocks)
        programs.shrink_examples[grid](
            x_TD,
            w_ERD,
            rows.index_BK,
            out_NR,
            other_NR,
            dots,
            num_tokens,
            rows.tokens_per_example,
            width,
            x_TD.stride(0),
            K=top_k,
            R=rank,
            HAS_OTHER=other_NR is not None,
            BLOCK_M=tiles.rows,
            BLOCK_C=block,
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
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_tk`, all slots in one launch; `out` may be `source`."""
    _, rank, width = w_ERO.shape
    if not rows.num_tokens:
        return out_TO
    tiles = expand_tiles(rows.num_tokens, rows.num_examples, rows.top_k * rank, h_NR.dtype)
    grid = (
        rows.num_examples * triton.cdiv(rows.tokens_per_example, tiles.rows),
        triton.cdiv(width, tiles.columns),
    )
    programs.expand_examples[grid](
        h_NR,
        w_ERO,
        weights_BK,
        rows.index_BK,
        source_TO,
        out_TO,
        rows.tokens_per_example,
        width,
        0 if source_TO is None else source_TO.stride(0),
        scaling,
        K=rows.top_k,
        R=rank,
        HAS_WEIGHT=weights_BK is not None,
        HAS_SOURCE=source_TO is not None,
        BLOCK_M=tiles.rows,
        BLOCK_W=tiles.columns,
        BLOCK_C=expand_rank_block(rows.top_k * rank, h_NR.dtype),
        **options(tiles),
        **precision_of(h_NR.dtype),
    )
    return out_TO


@on_its_device
def run_weight_gradient(
    h_NR: torch.Tensor, y_TW: torch.Tensor, weights_BK: torch.Tensor | None, rows: Rows, scaling: float
) -> torch.Tensor:
    """`Σ scaling · w_bk · h_tk y_tᵀ` over the pairs of each expert, `(E, R, W)` in the dtype of `h`.

    One expert, the universal one, may have all tokens: there are as many splits as it needs.
    """
    rank, width = h_NR.shape[1], y_TW.shape[1]
    if not rows.num_tokens:
        return h_NR.new_zeros(rows.num_experts, rank, width)
    splits = splits_of(rows.num_tokens)
    out = torch.empty(splits, rows.num_experts, rank, width, dtype=torch.float32, device=h_NR.device)
    tiles, block = gradient_tiles(rank, h_NR.dtype), rank_block(rank)
    grid = (rows.num_experts * splits, triton.cdiv(rank, block), triton.cdiv(width, tiles.columns))
    programs.weight_gradient_examples[grid](
        h_NR,
        y_TW,
        weights_BK,
        rows.index_BK,
        out,
        rows.num_examples * rows.top_k,
        rows.tokens_per_example,
        rows.num_experts,
        width,
        y_TW.stride(0),
        scaling,
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
