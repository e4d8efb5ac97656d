"""Starts the programs for LoRA experts: a launcher for each step, which takes the program of the path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .paths import Path
from .programs import dense, examples, pairs, sorted_rows
from .rows import Rows
from .tiles import (
    MAX_RANK_BLOCK,
    Tiles,
    expand_rank_block,
    expand_tiles,
    gradient_tiles,
    launch,
    next_power_of_two,
    precision_of,
    rank_block,
    shrink_tiles,
    splits_of,
)


class Programs(NamedTuple):
    """The programs of a path. Backward of `decode` is that of `examples`."""

    shrink: Any
    expand: Any
    weight_gradient: Any


PROGRAMS: dict[Path, Programs] = {
    "decode": Programs(pairs.shrink_pairs, pairs.expand_pairs, None),
    "examples": Programs(examples.shrink_examples, examples.expand_examples, examples.weight_gradient_examples),
    "dense": Programs(dense.shrink_dense, dense.expand_dense, dense.weight_gradient_dense),
    "sorted": Programs(sorted_rows.shrink, sorted_rows.expand, sorted_rows.weight_gradient),
}
# ranks of a program that shrinks a pair: few, so that a single token already occupies many cores
PAIR_SHRINK_RANKS, PAIR_SHRINK_COLUMNS = 4, 512
PAIR_EXPAND_RANKS, PAIR_EXPAND_COLUMNS = 16, 128
PAIR_WARPS, PAIR_STAGES = 4, 3


class Plan(NamedTuple):
    """How a step of a path is cut: tiles, what a program must know of them, and how many programs there are."""

    tiles: Tiles
    sizes: dict[str, int]
    grid: tuple[int, ...]


def columns_of(path: Path, rows: Rows, rank: int) -> int:
    """What lies side by side in rank space: the K experts of an example, all experts, or one."""
    return rank * {"examples": rows.top_k, "dense": rows.num_experts}.get(path, 1)


def segments_of(path: Path, rows: Rows) -> int:
    """How many runs of rows a slot has that no tile may cross."""
    return {"examples": rows.num_examples, "sorted": rows.num_experts}.get(path, 1)


def row_programs(path: Path, rows: Rows, num_slots: int, block: int) -> int:
    """As many tiles of rows as any routing needs."""
    if path == "examples":
        return rows.num_examples * triton.cdiv(rows.tokens_per_example, block)  # type: ignore[no-any-return]
    slots, spare = num_slots if path in ("decode", "sorted") else 1, 0
    if path == "sorted":
        spare = num_slots * rows.num_experts
    return triton.cdiv(rows.num_tokens * slots, block) + spare  # type: ignore[no-any-return]


def shrink_plan(path: Path, rows: Rows, rank: int, dtype: torch.dtype) -> Plan:
    """That of `W_e x`."""
    columns = columns_of(path, rows, rank)
    if path == "decode":
        tiles, block = Tiles(1, PAIR_SHRINK_COLUMNS, PAIR_WARPS, PAIR_STAGES), PAIR_SHRINK_RANKS
    else:
        slots = rows.top_k if path == "sorted" else 1
        tiles = shrink_tiles(rows.num_tokens * slots, segments_of(path, rows) * slots, columns, dtype)
        block = rank_block(columns)
    sizes = {"BLOCK_M": tiles.rows, "BLOCK_R": block, "BLOCK_C": block, "BLOCK_D": tiles.columns}
    sizes["SEGMENTS"] = next_power_of_two(rows.top_k * rows.num_experts)
    return Plan(tiles, sizes, (row_programs(path, rows, rows.top_k, tiles.rows), triton.cdiv(columns, block)))


def expand_plan(path: Path, rows: Rows, rank: int, width: int, dtype: torch.dtype) -> Plan:
    """That of `Wᵀ h`; where tokens are sorted, of one slot."""
    columns = columns_of(path, rows, rank)
    if path == "decode":
        tiles = Tiles(1, PAIR_EXPAND_COLUMNS, PAIR_WARPS, PAIR_STAGES)
        block = min(next_power_of_two(rank), PAIR_EXPAND_RANKS)
    else:
        # to look up weights takes registers, so that dense tiles are as narrow as those of the widest rank
        looks_up = MAX_RANK_BLOCK if path == "dense" else columns
        tiles = expand_tiles(rows.num_tokens, segments_of(path, rows), looks_up, dtype)
        block = expand_rank_block(columns, dtype)
    sizes = {"BLOCK_M": tiles.rows, "BLOCK_W": tiles.columns, "BLOCK_R": block, "BLOCK_C": block}
    sizes["SEGMENTS"] = next_power_of_two(rows.num_experts)
    return Plan(tiles, sizes, (row_programs(path, rows, 1, tiles.rows), triton.cdiv(width, tiles.columns)))


def gradient_plan(path: Path, rows: Rows, rank: int, width: int, dtype: torch.dtype) -> Plan:
    """That of the gradient of an expert, whose long sums are split."""
    is_dense = path == "dense"
    columns = columns_of(path, rows, rank) if is_dense else rank
    tiles, block = gradient_tiles(MAX_RANK_BLOCK if is_dense else rank, dtype), rank_block(columns)
    # sorted rows spread over the experts; of examples, one expert, the universal one, may have all
    splits = splits_of(rows.num_tokens * rows.top_k // rows.num_experts if path == "sorted" else rows.num_tokens)
    sizes = {"BLOCK_N": tiles.rows, "BLOCK_W": tiles.columns, "BLOCK_R": block, "BLOCK_C": block, "SPLITS": splits}
    programs = splits if is_dense else rows.num_experts * splits
    return Plan(tiles, sizes, (programs, triton.cdiv(columns, block), triton.cdiv(width, tiles.columns)))


def facts_of(rows: Rows, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """What programs ask of rows, by the names of their arguments."""
    token_of_row, segment_end = rows.order or (None, None)
    return {
        "index": rows.index_BK,
        "token_of_row": token_of_row,
        "segment_end": segment_end,
        "num_tokens": rows.num_tokens,
        "num_choices": rows.num_examples * rows.top_k,
        "tokens_per_example": rows.tokens_per_example,
        "E": rows.num_experts,
        "K": rows.top_k,
        "R": rank,
        **precision_of(dtype),
    }


def run_shrink(
    path: Path, x_TD: torch.Tensor, w_ERD: torch.Tensor, rows: Rows, other_NR: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`W_e x_t` for every row `(N, R)`, on the dense path for all experts `(T·E, R)`.

    With `other` also the dot product with that, `(T, K)` float32; not on the path `decode`, which has no backward.
    """
    num_experts, rank, width = w_ERD.shape
    out = x_TD.new_empty(rows.num_tokens * (num_experts if path == "dense" else rows.top_k), rank)
    plan = shrink_plan(path, rows, rank, x_TD.dtype)
    dots = None
    if other_NR is not None:
        dots = x_TD.new_empty(plan.grid[1], rows.num_tokens, rows.top_k, dtype=torch.float32)
    if rows.num_tokens:
        facts: dict[str, Any] = {"x": x_TD, "w": w_ERD, "out": out, "other": other_NR, "dots": dots}
        facts |= {"D": width, "stride_x": x_TD.stride(0), **plan.sizes, **facts_of(rows, rank, x_TD.dtype)}
        launch(PROGRAMS[path].shrink, plan.grid, plan.tiles, x_TD, facts)
    if dots is None:
        return out, None
    return out, dots[0] if plan.grid[1] == 1 else dots.sum(0)


def run_expand(
    path: Path,
    h_NR: torch.Tensor,
    w_ERO: torch.Tensor,
    weights_BK: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    source_TO: torch.Tensor | None,
    out_TO: torch.Tensor,
) -> torch.Tensor:
    """`out_t = source_t + Σ_k scaling · w_bk · W_eᵀ h_tk`; `out` may be `source`, which `decode` must have.

    Where tokens are sorted, slot after slot: in the rows of one slot a token stands once, so that no atomics are
    needed.
    """
    _, rank, width = w_ERO.shape
    if not rows.num_tokens:
        return out_TO
    plan = expand_plan(path, rows, rank, width, h_NR.dtype)
    facts: dict[str, Any] = {"h": h_NR, "w": w_ERO, "weight": weights_BK, "out": out_TO}
    facts |= {"W": width, "scaling": scaling, **plan.sizes, **facts_of(rows, rank, h_NR.dtype)}
    for slot in range(rows.top_k if path == "sorted" else 1):
        source = source_TO if slot == 0 else out_TO
        facts |= {"slot": slot, "source": source}
        facts["stride_source"] = 0 if source is None else source.stride(0)
        launch(PROGRAMS[path].expand, plan.grid, plan.tiles, h_NR, facts)
    return out_TO


def run_weight_gradient(
    path: Path, h_NR: torch.Tensor, y_TW: torch.Tensor, weights_BK: torch.Tensor | None, rows: Rows, scaling: float
) -> torch.Tensor:
    """`Σ scaling · w_bk · h_tk y_tᵀ` over the pairs of each expert, `(E, R, W)` in the dtype of `h`.

    Long sums are split, and the parts added in a fixed order, so that no two programs write to one place.
    """
    rank, width = h_NR.shape[1], y_TW.shape[1]
    if not rows.num_tokens:
        return h_NR.new_zeros(rows.num_experts, rank, width)
    plan = gradient_plan(path, rows, rank, width, h_NR.dtype)
    splits = plan.sizes["SPLITS"]
    out = torch.empty(splits, rows.num_experts, rank, width, dtype=torch.float32, device=h_NR.device)
    facts: dict[str, Any] = {"h": h_NR, "y": y_TW, "weight": weights_BK, "out": out}
    facts |= {"W": width, "stride_y": y_TW.stride(0), "scaling": scaling}
    facts |= {**plan.sizes, **facts_of(rows, rank, h_NR.dtype)}
    launch(PROGRAMS[path].weight_gradient, plan.grid, plan.tiles, h_NR, facts)
    return (out[0] if splits == 1 else out.sum(0)).to(h_NR.dtype)
