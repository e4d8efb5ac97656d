"""Starts the programs on tensors: grids and tile sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from . import is_interpreted, programs
from .rows import Rows


MIN_BLOCK = 16
MAX_RANK_BLOCK = 128
ROWS_PER_SPLIT = 2048
MAX_SPLITS = 16
# AMD's GPUs have 64 KiB of shared memory for a block
MAX_HIP_STAGES = 2


class Tiles(NamedTuple):
    """Tile sizes and how many warps share one tile."""

    rows: int
    columns: int
    warps: int
    stages: int


def options(tiles: Tiles) -> dict[str, int]:
    """How a program is compiled for the device at hand."""
    stages = min(tiles.stages, MAX_HIP_STAGES) if torch.version.hip else tiles.stages
    return {"num_warps": tiles.warps, "num_stages": stages}


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def rank_block(rank: int) -> int:
    """Ranks in one tile: a power of two, at least what a tensor core takes."""
    return min(max(next_power_of_two(rank), MIN_BLOCK), MAX_RANK_BLOCK)


def shrink_tiles(num_rows: int, num_segments: int, rank: int, dtype: torch.dtype) -> Tiles:
    """Few rows per expert (decoding) get short tiles, wide ranks shallow ones; exact float32 needs more warps.

    Chosen so that no register spills on sm_80 to sm_100, which is tested, and not yet tuned on a device.
    """
    is_short = num_rows <= MIN_BLOCK * num_segments
    if rank_block(rank) > 64:
        return Tiles(MIN_BLOCK if is_short else 64, 32, 8 if dtype == torch.float32 else 4, 3)
    return Tiles(MIN_BLOCK if is_short else 64, 128, 8 if dtype == torch.float32 else 2 if is_short else 4, 3)


def expand_tiles(num_rows: int, num_segments: int, rank: int, dtype: torch.dtype) -> Tiles:
    """As above; wide ranks get narrow tiles, and exact float32 small ones."""
    is_short = num_rows <= MIN_BLOCK * num_segments
    if dtype == torch.float32:
        return Tiles(MIN_BLOCK if is_short else 32, 64, 8, 2)
    return Tiles(MIN_BLOCK if is_short else 64, 64 if rank_block(rank) > 64 else 128, 4, 2)


def expand_rank_block(rank: int, dtype: torch.dtype) -> int:
    """Ranks per step of the product."""
    return MIN_BLOCK if dtype == torch.float32 else rank_block(rank)


def gradient_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Rows per step of the sum, and columns of the gradient."""
    is_exact = dtype == torch.float32
    return Tiles(32 if is_exact else 64, 64 if is_exact or rank_block(rank) > 64 else 128, 8 if is_exact else 4, 3)


def precision_of(dtype: torch.dtype) -> dict[str, Any]:
    """Exact float32 unless torch was told to allow tf32."""
    allows_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "PRECISION": "tf32" if allows_tf32 else "ieee",
        "UPCAST": is_interpreted() and dtype == torch.bfloat16,
    }


def run_shrink(
    x_TD: torch.Tensor, w_ERD: torch.Tensor, rows: Rows, other_NR: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`W_e x_t` for every row `(N, R)`, and with `other` its dot product with that, `(T, K)` float32."""
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
            rows.token_of_row,
            rows.segment_end,
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


def run_expand(
    h_NR: torch.Tensor,
    w_ERO: torch.Tensor,
    weights_TK: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    source_TO: torch.Tensor | None,
    out_TO: torch.Tensor,
) -> torch.Tensor:
    """`out_t = source_t + Σ_k scaling · w_tk · W_eᵀ h_n`, slot after slot; `out` may be `source`."""
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
            weights_TK,
            rows.token_of_row,
            rows.segment_end,
            source,
            out_TO,
            rows.num_tokens,
            width,
            0 if source is None else source.stride(0),
            scaling,
            slot,
            E=num_experts,
            K=rows.top_k,
            R=rank,
            SEGMENTS=next_power_of_two(num_experts),
            HAS_WEIGHT=weights_TK is not None,
            HAS_SOURCE=source is not None,
            BLOCK_M=tiles.rows,
            BLOCK_W=tiles.columns,
            BLOCK_R=expand_rank_block(rank, h_NR.dtype),
            **options(tiles),
            **precision_of(h_NR.dtype),
        )
    return out_TO


def run_weight_gradient(
    h_NR: torch.Tensor, y_TW: torch.Tensor, weights_TK: torch.Tensor | None, rows: Rows, scaling: float
) -> torch.Tensor:
    """`Σ_n scaling · w_tk · h_n y_tᵀ` over the rows of each expert, `(E, R, W)` in the dtype of `h`.

    Long sums are split, and the parts added in a fixed order, so that no two programs write to one place.
    """
    rank, width = h_NR.shape[1], y_TW.shape[1]
    num_rows = h_NR.shape[0]
    if not num_rows:
        return h_NR.new_zeros(rows.num_experts, rank, width)
    splits = min(max(num_rows // (ROWS_PER_SPLIT * rows.num_experts), 1), MAX_SPLITS)
    out = torch.empty(splits, rows.num_experts, rank, width, dtype=torch.float32, device=h_NR.device)
    tiles, block = gradient_tiles(rank, h_NR.dtype), rank_block(rank)
    grid = (rows.num_experts * splits, triton.cdiv(rank, block), triton.cdiv(width, tiles.columns))
    programs.weight_gradient[grid](
        h_NR,
        y_TW,
        weights_TK,
        rows.token_of_row,
        rows.segment_end,
        out,
        rows.num_tokens,
        width,
        y_TW.stride(0),
        scaling,
        E=rows.num_experts,
        K=rows.top_k,
        R=rank,
        SPLITS=splits,
        HAS_WEIGHT=weights_TK is not None,
        BLOCK_R=block,
        BLOCK_W=tiles.columns,
        BLOCK_N=tiles.rows,
        **options(tiles),
        **precision_of(h_NR.dtype),
    )
    return (out[0] if splits == 1 else out.sum(0)).to(h_NR.dtype)
