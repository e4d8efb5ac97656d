"""Starts the programs that compute all experts for all tokens."""

from __future__ import annotations

import torch
import triton

from ..programs import dense as programs
from ..rows import Rows
from ..tiles import (
    MAX_RANK_BLOCK,
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


# to look up weights takes registers, so that tiles are as narrow as those of the widest rank, whatever the rank
NARROW = MAX_RANK_BLOCK


@on_its_device
def run_shrink(
    x_TD: torch.Tensor, w_ERD: torch.Tensor, rows: Rows, other_NR: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`W_e x_t` for all experts of every token `(T·E, R)`, and with `other` its dot product with that, `(T, K)` float32."""
    num_experts, rank, width = w_ERD.shape
    num_tokens, num_columns = rows.num_tokens, num_experts * rank
    out_NR = x_TD.new_empty(num_tokens * num_experts, rank)
    block = rank_block(num_columns)
    num_blocks = triton.cdiv(num_columns, block)
    dots = None
    if other_NR is not None:
        dots = x_TD.new_empty(num_blocks, num_tokens, rows.top_k, dtype=torch.float32)
    if num_tokens:
        tiles = shrink_tiles(num_tokens, 1, num_columns, x_TD.dtype)
        programs.shrink_dense[(triton.cdiv(num_tokens, tiles.rows), num_blocks)](
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
            E=num_experts,
            K=rows.top_k,
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
    """`out_t = source_t + Σ_k scaling · w_tk · W_eᵀ h_te`; `out` may be `source`."""
    num_experts, rank, width = w_ERO.shape
    if not rows.num_tokens:
        return out_TO
    tiles = expand_tiles(rows.num_tokens, 1, NARROW, h_NR.dtype)
    programs.expand_dense[(triton.cdiv(rows.num_tokens, tiles.rows), triton.cdiv(width, tiles.columns))](
        h_NR,
        w_ERO,
        weights_BK,
        rows.index_BK,
        source_TO,
        out_TO,
        rows.num_tokens,
        rows.tokens_per_example,
        width,
        0 if source_TO is None else source_TO.stride(0),
        scaling,
        E=num_experts,
        K=rows.top_k,
        R=rank,
        HAS_WEIGHT=weights_BK is not None,
        HAS_SOURCE=source_TO is not None,
        BLOCK_M=tiles.rows,
        BLOCK_W=tiles.columns,
        BLOCK_C=expand_rank_block(num_experts * rank, h_NR.dtype),
        **options(tiles),
        **precision_of(h_NR.dtype),
    )
    return out_TO


@on_its_device
def run_weight_gradient(
    h_NR: torch.Tensor, y_TW: torch.Tensor, weights_BK: torch.Tensor | None, rows: Rows, scaling: float
) -> torch.Tensor:
    """`Σ scaling · w_tk · h_te y_tᵀ` over the tokens that chose each expert, `(E, R, W)` in the dtype of `h`."""
    num_experts, rank, width = rows.num_experts, h_NR.shape[1], y_TW.shape[1]
    if not rows.num_tokens:
        return h_NR.new_zeros(num_experts, rank, width)
    splits = splits_of(rows.num_tokens)
    out = torch.empty(splits, num_experts, rank, width, dtype=torch.float32, device=h_NR.device)
    tiles, block = gradient_tiles(NARROW, h_NR.dtype), rank_block(num_experts * rank)
    grid = (splits, triton.cdiv(num_experts * rank, block), triton.cdiv(width, tiles.columns))
    programs.weight_gradient_dense[grid](
        h_NR,
        y_TW,
        weights_BK,
        rows.index_BK,
        out,
        rows.num_tokens,
        rows.tokens_per_example,
        width,
        y_TW.stride(0),
        scaling,
        E=num_experts,
        K=rows.top_k,
        R=rank,
        SPLITS=splits,
        HAS_WEIGHT=weights_BK is not None,
        BLOCK_C=block,
        BLOCK_W=tiles.columns,
        BLOCK_N=tiles.rows,
        **options(tiles),
        **precision_of(h_NR.dtype),
    )
    return (out[0] if splits == 1 else out.sum(0)).to(h_NR.dtype)
